"""Every op in plain torch: the specification, the fallback on any device, and the oracle of the tests.

    wire     stats(x): this rank's [shift(C), sum(C), sumsq(C), weight, samples, tag, tag²], float64: sums of x - shift, which may
             be added over the ranks if their shifts are equal
    forward  y  = activation(weight * xhat + bias + residual),          xhat = (x - mean) * invstd
    backward dz = dy through the activation
             dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n)

moments.py has the statistics, and the reasons why they are accurate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import Activation, activate, derivative, keeps_mask, needs_only_sign, scaled_by_sign, writes_dz
from .layout import mask_rows
from .moments import acc_type, backward_sums, by_channel, channel_sum, effective_count, finalize, parts, parts_of_sums, split_mean
from .moments import stats as stats
from .moments import update_running_stats as update_running_stats

# ---- The ops ------------------------------------------------------------------------------------------------------------------


def normalize(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    unbiased: bool,
    eps: float,
    activation: int,
    negative_slope: float,
    tag: int = 0,
    ranks: int = 0,
    alarm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = activation(weight * xhat + bias + residual), and the moving statistics updated in place.

    x, residual, y [N, C, *] of one dtype; stats as returned by `stats`, summed over the ranks; weight, bias [C].
    Also returns the mask of z > 0, or NaN, as bits (`layout.mask_bytes`), empty unless the backward pass needs it. activation is the number
    of an `Activation`; any other is a ValueError.

    alarm [1] int32 on the CPU is set to 1 unless each of the `ranks` has passed this tag to `stats`; if each has, alarm stays as it is.
    Kernels of other devices need it in pinned memory, and set it when they run. The results do not depend on it.
    """
    s = parts(stats)
    _verify(s.tag, s.tag_squared, tag, ranks, alarm)
    z = _affine(x, stats, weight, bias, residual, eps)
    y = activate(z, activation, negative_slope).to(x.dtype)
    update_running_stats(stats, running_mean, running_var, num_batches_tracked, momentum, unbiased)  # after what can fail
    keep_mask = keeps_mask(activation, residual is not None)
    mask = _pack_bits(~(z <= 0), x) if keep_mask else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x).copy_(y), mask


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    tag: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that the backward exchange adds up, and this rank's parameter gradients.

    dy, x [N, C, *]  ->  sums [2C + 2] float64: `moments.BackwardSums`; dweight; dbias.

    If `normalize` had a residual, silu needs it, and relu and leaky_relu need the mask. dweight and dbias have the types of weight and
    bias, and are empty if these are None.
    """
    dz = through_activation(dy, x, stats, weight, bias, residual, mask, eps, activation, negative_slope)
    invstd = finalize(stats, eps)[2]
    hi, lo = split_mean(stats, dz.dtype)
    sum_dy = channel_sum(by_channel(dz))
    sum_dy_xmu = channel_sum(by_channel(dz * (x.to(dz.dtype) - _per_channel(hi, x)))) - lo * sum_dy
    sum_dy_xhat = sum_dy_xmu * invstd
    return (
        backward_sums(sum_dy, sum_dy_xhat, tag),
        x.new_empty(0) if weight is None else sum_dy_xhat.to(weight.dtype, copy=True),
        x.new_empty(0) if bias is None else sum_dy.to(bias.dtype, copy=True),
    )


def backward_input(
    dy: Tensor,
    sums: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    rank_weighted: bool = False,
    tag: int = 0,
    ranks: int = 0,
    alarm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n) and dz, the residual's gradient, [N, C, *] of x's dtype.

    sums are those of `backward_reduce`, summed over the ranks. n is the number of samples of the group, or with rank_weighted this
    rank's number times the number of ranks that have samples. dz is empty unless a residual was added before an activation.
    tag, ranks and alarm are those of `normalize`, for `sums`.
    """
    total = parts_of_sums(sums)
    _verify(total.tag, total.tag_squared, tag, ranks, alarm)
    dz = through_activation(dy, x, stats, weight, bias, residual, mask, eps, activation, negative_slope)
    invstd = finalize(stats, eps)[2]
    hi, lo = split_mean(stats, dz.dtype)
    n = effective_count(stats, x, rank_weighted)
    scale = invstd if weight is None else invstd * weight.double()
    slope = scale * invstd * total.sum_dy_xhat / n  # of (x - mean)
    shift = lo * slope - scale * total.sum_dy / n
    to_acc = lambda t: _per_channel(t.to(dz.dtype), x)  # noqa: E731
    dx = dz * to_acc(scale) - (x.to(dz.dtype) - to_acc(hi)) * to_acc(slope) + to_acc(shift)
    dx = torch.empty_like(x).copy_(dx)
    return dx, (torch.empty_like(x).copy_(dz) if writes_dz(activation, residual, mask) else x.new_empty(0))


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    unbiased: bool,
    eps: float,
    activation: int,
    negative_slope: float,
    rank_weighted: bool = False,
) -> tuple[Tensor, Tensor]:
    """`stats` and `normalize` of a single process without a residual: y and the stats."""
    own, running = stats(x, rank_weighted, shifted=True), (running_mean, running_var, num_batches_tracked)
    return normalize(x, own, weight, bias, None, *running, momentum, unbiased, eps, activation, negative_slope)[0], own


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    rank_weighted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward_reduce` and `backward_input` of a single process without a residual: dx, dweight and dbias."""
    kept = x, stats, weight, bias, None, None, eps, activation, negative_slope
    sums, dweight, dbias = backward_reduce(dy, *kept)
    return backward_input(dy, sums, *kept, rank_weighted)[0], dweight, dbias


# ---- Parts --------------------------------------------------------------------------------------------------------------------


def _verify(tag_sum: Tensor, tag_squared_sum: Tensor, tag: int, ranks: int, alarm: Tensor | None) -> None:
    """Sets alarm to 1 unless the sums are `ranks` times this tag and `ranks` times its square."""
    if alarm is not None:
        mixed = (tag_sum != ranks * tag) | (tag_squared_sum != ranks * tag * tag)
        before = alarm.to(mixed.device, non_blocking=True)
        alarm.copy_(torch.where(mixed, torch.ones_like(before), before), non_blocking=True)


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...] to broadcast against x."""
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
    """z = weight * xhat + bias + residual, in the accumulation type."""
    acc = acc_type(x.dtype)
    invstd = finalize(stats, eps)[2]
    hi, lo = split_mean(stats, acc)
    scale = invstd if weight is None else invstd * weight.double()
    shift = -lo * scale if bias is None else bias.double() - lo * scale
    z = (x.to(acc) - _per_channel(hi, x)) * _per_channel(scale.to(acc), x) + _per_channel(shift.to(acc), x)
    return z if residual is None else z + residual.to(acc)


def through_activation(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> Tensor:
    """dz = dy * activation'(z), in the accumulation type. z is recomputed, unless its sign was kept in the mask."""
    dz = dy.to(acc_type(x.dtype))
    if activation == Activation.none:
        return dz
    if not needs_only_sign(activation):
        return dz * derivative(_affine(x, stats, weight, bias, residual, eps), activation)
    if mask is None and residual is not None:
        raise ValueError("mask must be given with a residual and this activation, as normalize returned it")
    positive = ~(_affine(x, stats, weight, bias, None, eps) <= 0) if mask is None else _unpack_bits(mask, x)  # NaN passes
    return scaled_by_sign(dz, positive, activation, negative_slope)


def _pack_bits(positive: Tensor, x: Tensor) -> Tensor:
    """Booleans of x's shape -> uint8 bits in the order of x's memory; see `layout.mask_bytes`."""
    bits = F.pad(_in_memory_order(torch.empty_like(x, dtype=torch.uint8).copy_(positive)).view(mask_rows(x)), (0, 8)).flatten()
    bits = F.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=x.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack_bits(mask: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_pack_bits`."""
    rows, length = mask_rows(x)
    bits = (mask[:, None] >> torch.arange(8, device=x.device, dtype=torch.uint8)) & 1
    positive = torch.empty_like(x, dtype=torch.bool)
    _in_memory_order(positive).copy_(bits.flatten()[: rows * (length + 8)].view(rows, length + 8)[:, :length].reshape(-1))
    return positive


def _in_memory_order(x: Tensor) -> Tensor:
    """The dense tensor x as a flat view of its memory."""
    return x.view(-1) if x.is_contiguous() else x.movedim(1, -1).view(-1)
