"""Every op in plain torch: the specification, the fallback on any device, and the oracle of the tests.

    wire     stats(x): this rank's [sum(C), sumsq(C), count], float64; summed over the ranks it is the group's
    forward  y  = activation(weight * xhat + bias + residual),          xhat = (x - mean) * invstd
    backward dz = dy through the activation
             dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n)

Numerics (each is tested on adversarial data):
  - Raw sums of squares cancel where mean >> std. Each chunk of a channel is shifted by K, the mean of its first values, summed
    in the accumulation type, and brought back in float64: sum = n K + s1, sumsq = s2 + K (2 s1 + n K).
  - The mean is used as two numbers of the accumulation type, mean = hi + lo, and x - hi comes before any product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import mask_rows, samples_per_channel

CHUNK = 1024  # values that share a shift; long enough for speed, short enough for float32 sums
SHIFT_VALUES = 128  # values behind a shift: a single one could be an outlier and cost three digits

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


def acc_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of `dtype` are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- Statistics -------------------------------------------------------------------------------------------------------------


def stats(x: Tensor, rank_weighted: bool = False) -> Tensor:
    """The numbers that the forward exchange sums.

    x [N, C, *]  ->  [2C + 1] float64: sum(C), sumsq(C), count.

    With rank_weighted, [2C + 2]: sum(C) / count, sumsq(C) / count, count, 1, so that each rank weighs the same. A rank without
    samples gives zeros. In both forms the number of samples is at 2C and the sum of the weights is last.
    """
    count = samples_per_channel(x)
    sums = torch.cat(_shifted_sums(_by_channel(x, acc_type(x.dtype))))
    if not rank_weighted:
        return torch.cat([sums, sums.new_full((1,), count)])
    return torch.cat([sums / max(count, 1), sums.new_full((1,), count), sums.new_full((1,), min(count, 1))])  # no copy to the device


def finalize(stats: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mean, biased variance and 1 / sqrt(var + eps), each [C] float64, from the summed `stats`. Zeros where there are no samples."""
    channels = (stats.numel() - 1) // 2
    weight = stats[-1].clamp(min=1)
    mean = stats[:channels] / weight
    var = torch.clamp(stats[channels : 2 * channels] / weight - mean * mean, min=0)
    return mean, var, (var + eps).rsqrt()


def update_running_stats(
    stats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    unbiased: bool,
) -> None:
    """running += momentum * (new - running), in place; without samples anywhere, nothing changes.

    momentum None is the cumulative average, 1 / num_batches_tracked, computed on the device.
    """
    channels = (stats.numel() - 1) // 2
    count = stats[2 * channels]
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
            running.copy_(torch.where(factor > 0, old + factor * (new - old), old))


# ---- The four ops -------------------------------------------------------------------------------------------------------------


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
    eps: float,
    unbiased: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """y = activation(weight * xhat + bias + residual), and the moving statistics updated in place.

    x, residual, y [N, C, *] of one dtype; stats as `stats` gives them, summed over the ranks; weight, bias [C].
    Also returns the mask of z > 0 as bits (`layout.mask_bytes`), empty unless the backward pass needs it.
    """
    update_running_stats(stats, running_mean, running_var, num_batches_tracked, momentum, unbiased)
    z = _affine(x, stats, weight, bias, residual, eps)
    y = _activate(z, activation, negative_slope).to(x.dtype)
    keep_mask = residual is not None and activation in ("relu", "leaky_relu")
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
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that the backward exchange adds up, and this rank's parameter gradients.

    dy, x [N, C, *]  ->  sums [2C] float64: sum_dy = Σ dz, sum_dy_xhat = Σ dz xhat; dweight; dbias.

    residual is that of `normalize` before silu; before relu and leaky_relu the mask is enough. dweight and dbias have the type of
    weight and bias, empty where these are None.
    """
    dz = through_activation(dy, x, stats, weight, bias, residual, mask, eps, activation, negative_slope)
    mean, _, invstd = finalize(stats, eps)
    hi, lo = _split(mean, dz.dtype)
    sum_dy = _sum(_by_channel(dz))
    sum_dy_xmu = _sum(_by_channel(dz * (x.to(dz.dtype) - _per_channel(hi, x)))) - lo * sum_dy
    sum_dy_xhat = sum_dy_xmu * invstd
    return (
        torch.cat([sum_dy, sum_dy_xhat]),
        x.new_empty(0) if weight is None else sum_dy_xhat.to(weight.dtype, copy=True),
        x.new_empty(0) if bias is None else sum_dy.to(bias.dtype, copy=True),
    )


def backward_input(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n) and dz, the residual's gradient, [N, C, *] of x's dtype.

    sums are those of `backward_reduce`, summed over the ranks. n is the number of samples of the group; where ranks weigh the
    same, it is this rank's count times the number of ranks. dz is empty unless a residual was added before an activation.
    """
    dz = through_activation(dy, x, stats, weight, bias, residual, mask, eps, activation, negative_slope)
    mean, _, invstd = finalize(stats, eps)
    hi, lo = _split(mean, dz.dtype)
    sum_dy, sum_dy_xhat = sums.chunk(2)
    n = effective_count(stats, x)
    scale = invstd if weight is None else invstd * weight.double()
    slope = scale * invstd * sum_dy_xhat / n  # of (x - mean)
    shift = lo * slope - scale * sum_dy / n
    to_acc = lambda t: _per_channel(t.to(dz.dtype), x)  # noqa: E731
    dx = dz * to_acc(scale) - (x.to(dz.dtype) - to_acc(hi)) * to_acc(slope) + to_acc(shift)
    dx = torch.empty_like(x).copy_(dx)
    return dx, (torch.empty_like(x).copy_(dz) if writes_dz(activation, residual, mask) else x.new_empty(0))


def writes_dz(activation: str, residual: Tensor | None, mask: Tensor | None) -> bool:
    """Whether a residual was added before an activation: silu keeps it for the backward pass, the others the mask."""
    return activation != "none" and (residual if activation == "silu" else mask) is not None


def effective_count(stats: Tensor, x: Tensor) -> Tensor:
    """The n of the backward formula: sum of the weights over the weight of one of this rank's samples. Never 0."""
    rank_weighted = stats.numel() == 2 * x.shape[1] + 2
    return (stats[-1] * (samples_per_channel(x) if rank_weighted else 1)).clamp(min=1)


# ---- Parts --------------------------------------------------------------------------------------------------------------------


def _by_channel(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[N, C, *] -> [C, count]."""
    return x.movedim(1, 0).reshape(x.shape[1], samples_per_channel(x)).to(dtype or x.dtype)


def _chunks(x: Tensor) -> list[Tensor]:
    """[C, count] -> [C, chunks, CHUNK] and the rest [C, 1, <CHUNK]; what is empty is left out."""
    whole = x.shape[1] // CHUNK * CHUNK
    parts = (x[:, :whole].unflatten(1, (-1, CHUNK)) if whole else None, x[:, None, whole:] if whole < x.shape[1] else None)
    return [part for part in parts if part is not None]


def _shifted_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σx and Σx² [C] float64 of x [C, count]."""
    total, total_sq = x.new_zeros(2, x.shape[0], dtype=torch.float64)
    for part in _chunks(x):
        shift = part[..., :SHIFT_VALUES].mean(-1)
        d = part - shift[..., None]
        n, k = part.shape[-1], shift.double()
        s1, s2 = d.sum(-1).double(), d.square().sum(-1).double()
        total = total + (n * k + s1).sum(-1)
        total_sq = total_sq + (s2 + k * (2 * s1 + n * k)).sum(-1)
    return total, total_sq


def _sum(x: Tensor) -> Tensor:
    """Σ over the second dimension of x [C, count], float64; chunks in x's type, their sums in float64."""
    total = x.new_zeros(x.shape[0], dtype=torch.float64)
    for part in _chunks(x):
        total = total + part.sum(-1).double().sum(-1)
    return total


def _split(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mean float64 as hi of `dtype` and lo float64, hi + lo == mean."""
    hi = mean.to(dtype)
    return hi, mean - hi.double()


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...] to broadcast against x."""
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
    """z = weight * xhat + bias + residual, in the accumulation type."""
    acc = acc_type(x.dtype)
    mean, _, invstd = finalize(stats, eps)
    hi, lo = _split(mean, acc)
    scale = invstd if weight is None else invstd * weight.double()
    shift = -lo * scale if bias is None else bias.double() - lo * scale
    z = (x.to(acc) - _per_channel(hi, x)) * _per_channel(scale.to(acc), x) + _per_channel(shift.to(acc), x)
    return z if residual is None else z + residual.to(acc)


def _activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "none":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    assert activation == "silu", activation
    return F.silu(z)


def through_activation(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """dz = dy * activation'(z), in the accumulation type. z is recomputed, unless its sign was kept in the mask."""
    dz = dy.to(acc_type(x.dtype))
    if activation == "none":
        return dz
    if activation == "silu":
        z = _affine(x, stats, weight, bias, residual, eps)
        s = torch.sigmoid(z)
        return dz * (s * (1 + z * (1 - s)))
    if mask is None and residual is not None:
        raise ValueError(f"mask must be given with a residual and {activation}, as normalize returned it")
    positive = ~(_affine(x, stats, weight, bias, None, eps) <= 0) if mask is None else _unpack_bits(mask, x)  # NaN passes
    # Not dy * 0 for relu: an infinite dy stays out, as in torch.
    return torch.where(positive, dz, dz * negative_slope if activation == "leaky_relu" else dz.new_zeros(()))


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
