"""The statistics of a batch in plain torch: sums about a shift, how they merge, and what follows from them.

Numerics (each is tested on adversarial data):
  - Raw sums of squares cancel if mean >> std. So each chunk of a channel is summed about a K of its own, the mean of values from all
    over the chunk, in the accumulation type; its sums are then moved to the channel's shift in float64 (`_moved`).
  - The shift of a channel is one of its values: (shift - mean)² <= count * var, so that cancellation costs at most count * 2^-53 of
    the variance. If statistics can only be added up, the shift is 0, and it costs (mean / std)² * 2^-53.
  - The mean is used as a pair, mean = hi + lo with hi in the accumulation type, and x - hi is computed before any product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import samples_per_channel

CHUNK = 1024  # values that are summed about one K; long enough for speed, short enough for float32 sums
K_VALUES = 128  # K is the mean of about this many values: a single one could be an outlier, and cost three digits


def acc_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of `dtype` are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """The parts of `stats` [3C + 4], in this order, as views.

    sum and sumsq are Σ(x - shift) and Σ(x - shift)²; with rank_weighted they are divided by the rank's count. sum / weight is the mean of
    x - shift: weight is the number of samples per channel, or with rank_weighted the number of ranks that have samples. If the sums of
    `tag` and `tag_squared` over R ranks are R t and R t², every rank has sent the tag t.
    """

    shift: Tensor  # [C]
    sum: Tensor  # [C]
    sumsq: Tensor  # [C]
    weight: Tensor
    samples: Tensor
    tag: Tensor
    tag_squared: Tensor


class BackwardSums(NamedTuple):
    """The parts of `sums` [2C + 2], in this order, as views."""

    sum_dy: Tensor  # [C], Σ dz
    sum_dy_xhat: Tensor  # [C], Σ dz xhat
    tag: Tensor
    tag_squared: Tensor


STATS_TAIL = 4  # values after 3C in `stats`; csrc/args.h has the same
SUMS_TAIL = 2  # values after 2C in `sums`


def parts(stats: Tensor) -> Statistics:
    """`stats` [3C + 4] by its parts."""
    c = channels_of(stats)
    return Statistics(stats[:c], stats[c : 2 * c], stats[2 * c : 3 * c], *stats[3 * c :].unbind())


def parts_of_sums(sums: Tensor) -> BackwardSums:
    """`sums` [2C + 2] by its parts."""
    c = (sums.numel() - SUMS_TAIL) // 2
    return BackwardSums(sums[:c], sums[c : 2 * c], *sums[2 * c :].unbind())


def stats_numel(channels: int) -> int:
    """The number of values in the `stats` of C channels."""
    return 3 * channels + STATS_TAIL


def sums_numel(channels: int) -> int:
    """The number of values in the `sums` of C channels."""
    return 2 * channels + SUMS_TAIL


def channels_of(stats: Tensor) -> int:
    """C of `stats` [3C + 4]."""
    return (stats.numel() - STATS_TAIL) // 3


def stats(x: Tensor, rank_weighted: bool, shifted: bool = False, tag: int = 0) -> Tensor:
    """The statistics of this rank's x, in the form that the forward exchange adds up.

    x [N, C, *]  ->  [3C + 4] float64: `Statistics`.

    With rank_weighted the sums are divided by the count, and the weight is 1, so that all ranks have equal weight. A rank without samples
    returns zeros, apart from the tag. With shifted, the shift of a channel is its first value in x; else all shifts are 0, and the
    statistics of several ranks may be added up.
    """
    count = samples_per_channel(x)
    values = by_channel(x, acc_type(x.dtype))
    shift = values[:, 0].double() if count else values.new_zeros(x.shape[1], dtype=torch.float64)
    total, total_sq = _sums_about(values, shift)
    if not shifted:
        shift, total, total_sq = torch.zeros_like(shift), *_moved(count, total, total_sq, shift)
    divisor = max(count, 1) if rank_weighted else 1
    weight = min(count, 1) if rank_weighted else count
    return torch.cat([shift, total / divisor, total_sq / divisor, *_scalars(shift, weight, count, tag, tag * tag)])


def backward_sums(sum_dy: Tensor, sum_dy_xhat: Tensor, tag: int) -> Tensor:
    """`BackwardSums` of this rank in the form that the backward exchange adds up, [2C + 2]."""
    return torch.cat([sum_dy, sum_dy_xhat, *_scalars(sum_dy, tag, tag * tag)])


def _scalars(like: Tensor, *values: float) -> list[Tensor]:
    """Each value as a tensor [1] of the type of `like`, without a copy to its device."""
    return [like.new_full((1,), value) for value in values]


def rebase(stats: Tensor, shift: Tensor) -> Tensor:
    """The same statistics about other shifts [C]."""
    s = parts(stats)
    return torch.cat([shift, *_moved(s.weight, s.sum, s.sumsq, s.shift - shift), stats[3 * len(shift) :]])


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The statistics of the samples of both; a and b may have different shifts."""
    shift = torch.where(parts(a).weight > 0, parts(a).shift, parts(b).shift)
    total = rebase(a, shift) + rebase(b, shift)
    return torch.cat([shift, total[len(shift) :]])


def finalize(stats: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mean, biased variance and 1 / sqrt(var + eps), each [C] float64, from the group's `stats`. Without samples mean and var are 0."""
    s = parts(stats)
    weight = s.weight.clamp(min=1)
    offset = s.sum / weight
    var = torch.clamp(s.sumsq / weight - offset * offset, min=0)
    return s.shift + offset, var, (var + eps).rsqrt()


def split_mean(stats: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean as hi of `dtype` and lo of float64, hi + lo == shift + sum / weight. lo is hi's rounding error, for float64 not 0 either."""
    s = parts(stats)
    offset = s.sum / s.weight.clamp(min=1)
    hi = (s.shift + offset).to(dtype)
    return hi, (s.shift - hi.double()) + offset


def update_running_stats(
    stats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    unbiased: bool,
) -> None:
    """running += momentum * (new - running), in place. If no rank has samples, nothing changes.

    With momentum None, for the cumulative average, 1 / num_batches_tracked takes its place, computed on the device.
    """
    count = parts(stats).samples
    factor = (count > 0).double()
    if num_batches_tracked is not None:
        num_batches_tracked.add_((count > 0).to(num_batches_tracked.dtype))
    if momentum is not None:
        factor = factor * momentum
    elif num_batches_tracked is not None:
        factor = factor / num_batches_tracked.clamp(min=1)
    mean, var, _ = finalize(stats, 0.0)
    if unbiased:
        var = var * count / (count - 1).clamp(min=1)
    for running, new in ((running_mean, mean), (running_var, var)):
        if running is not None:
            old = running.double()
            # Computed from the nearer of old and new, so that a factor of 1 gives exactly new: with momentum 1, and in a cumulative
            # average's first step.
            moved = torch.where(factor < 0.5, old + factor * (new - old), new - (1 - factor) * (new - old))
            running.copy_(torch.where(factor == 0, old, moved))


def effective_count(stats: Tensor, x: Tensor, rank_weighted: bool) -> Tensor:
    """The n of the backward formula: the group's total weight, in units of the weight of one sample of this rank. Never 0."""
    return (parts(stats).weight * (samples_per_channel(x) if rank_weighted else 1)).clamp(min=1)


# ---- Parts --------------------------------------------------------------------------------------------------------------------


def by_channel(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[N, C, *] -> [C, count]."""
    return x.movedim(1, 0).reshape(x.shape[1], samples_per_channel(x)).to(dtype or x.dtype)


def _chunks(x: Tensor) -> list[Tensor]:
    """[C, count] -> [C, chunks, CHUNK] and the rest [C, 1, <CHUNK]; empty parts are left out."""
    whole = x.shape[1] // CHUNK * CHUNK
    parts = (x[:, :whole].unflatten(1, (-1, CHUNK)) if whole else None, x[:, None, whole:] if whole < x.shape[1] else None)
    return [part for part in parts if part is not None]


def _sums_about(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Σ(x - shift) and Σ(x - shift)² [C] float64 of x [C, count]."""
    total, total_sq = torch.zeros_like(shift), torch.zeros_like(shift)
    for part in _chunks(x):
        n = part.shape[-1]
        k = part[..., :: max(n // K_VALUES, 1)].mean(-1)
        d = part - k[..., None]
        sums = _moved(n, d.sum(-1).double(), d.square().sum(-1).double(), k.double() - shift[:, None])
        total, total_sq = total + sums[0].sum(-1), total_sq + sums[1].sum(-1)
    return total, total_sq


def _moved(n: Tensor | int, sum: Tensor, sumsq: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Σ(d + by) and Σ(d + by)² from n, Σd and Σd²."""
    return sum + n * by, sumsq + by * (2 * sum + n * by)


def channel_sum(x: Tensor) -> Tensor:
    """Σ over the second dimension of x [C, count], float64: each chunk is summed in x's type, and the results in float64."""
    total = x.new_zeros(x.shape[0], dtype=torch.float64)
    for part in _chunks(x):
        total = total + part.sum(-1).double().sum(-1)
    return total
