"""Every op in plain torch: the specification, the fallback on any device, and the oracle of the tests.

    wire     stats(x): this rank's [shift(C), sum(C), sumsq(C), weight, samples], float64, the sums of x - shift; about one shift
             the ranks' are added up
    forward  y  = activation(weight * xhat + bias + residual),          xhat = (x - mean) * invstd
    backward dz = dy through the activation
             dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n)

The statistics, and how they keep their digits: moments.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import mask_rows
from .moments import acc_type, by_channel, channel_sum, effective_count, finalize, split_mean, update_running_stats
from .moments import stats as stats

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


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
    invstd = finalize(stats, eps)[2]
    hi, lo = split_mean(stats, dz.dtype)
    sum_dy = channel_sum(by_channel(dz))
    sum_dy_xmu = channel_sum(by_channel(dz * (x.to(dz.dtype) - _per_channel(hi, x)))) - lo * sum_dy
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
    rank_weighted: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n) and dz, the residual's gradient, [N, C, *] of x's dtype.

    sums are those of `backward_reduce`, summed over the ranks. n is the number of samples of the group; where ranks weigh the
    same, it is this rank's count times the number of ranks. dz is empty unless a residual was added before an activation.
    """
    dz = through_activation(dy, x, stats, weight, bias, residual, mask, eps, activation, negative_slope)
    invstd = finalize(stats, eps)[2]
    hi, lo = split_mean(stats, dz.dtype)
    sum_dy, sum_dy_xhat = sums.chunk(2)
    n = effective_count(stats, x, rank_weighted)
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


# ---- Parts --------------------------------------------------------------------------------------------------------------------


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
