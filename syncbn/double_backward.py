"""The backward pass as a differentiable function, for `create_graph=True`: gradient penalties and other losses of a gradient.

The ops of the usual backward pass are opaque to autograd. This file has the same formula in plain torch, with the group's statistics as
functions of x, so that autograd can differentiate it again, any number of times, across the ranks. The loss that is differentiated
is the sum of the ranks' losses, as in the first backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation import Activation, derivative, needs_only_sign
from .comm.exchange import UNSYNCHRONIZED, LayerExchanges
from .layout import samples_per_channel
from .moments import acc_type, effective_count, finalize, parts, split_mean
from .reference import through_activation


class GroupSum(torch.autograd.Function):
    """total = Σ local over the ranks. Each rank's loss depends on each rank's part, so the gradient is summed over the ranks, too.

    `known` is the total if it has been exchanged before: the forward direction then needs no exchange.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, exchange: LayerExchanges, known: Tensor | None = None) -> Tensor:
        ctx.exchange = exchange
        if known is None and exchange is not UNSYNCHRONIZED:
            return exchange.sum(local, "double backward")
        return (local if known is None else known).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return GroupSum.apply(grad.contiguous(), ctx.exchange), None, None


def differentiable_backward(
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
    rank_weighted: bool,
    exchange: LayerExchanges,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz, dweight and dbias as differentiable functions of dy, x, weight, bias and residual.

        mean, var = those of `stats` in value, functions of all ranks' x in their derivatives
        xhat = (x - mean) * invstd,  dz = dy * activation'(weight * xhat + bias + residual)
        dx   = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n)

    It exchanges once, as the usual backward pass does, and its derivative twice. `residual` is needed for silu only; for the other
    activations the `mask` of signs replaces it.
    """
    acc = acc_type(x.dtype)
    dims = [d for d in range(x.dim()) if d != 1]

    def channel_sum(t: Tensor) -> Tensor:
        return t.sum(dims, dtype=torch.float64)

    def over(t: Tensor) -> Tensor:
        return t.to(acc).view(-1, *[1] * (x.dim() - 2))

    # The moments about hi do not cancel: hi is the mean up to a rounding error, `offset`.
    var = finalize(stats, eps)[1]
    total_weight, n = parts(stats).weight.clamp(min=1), effective_count(stats, x, rank_weighted)
    hi, offset = split_mean(stats, acc)
    centered = x.to(acc) - over(hi)
    sample_weight = 1 / max(samples_per_channel(x), 1) if rank_weighted else 1.0
    moments = sample_weight * torch.cat([channel_sum(centered), channel_sum(centered.square())])
    moments.requires_grad_()  # although x may not: this rank joins the exchange of the others' derivatives
    known = torch.cat([offset * total_weight, (var + offset.square()) * total_weight])
    first, second = (GroupSum.apply(moments, exchange, known) / total_weight).chunk(2)
    invstd = (second - first.square() + eps).rsqrt()
    xhat = (centered - over(first)) * over(invstd)

    if activation != Activation.none and not needs_only_sign(activation):
        z = xhat if weight is None else xhat * over(weight)
        z = z if bias is None else z + over(bias)
        z = z if residual is None else z + residual.to(acc)
        dz = dy.to(acc) * derivative(z, activation)
    else:  # a slope by the sign of z, constant almost everywhere
        dz = through_activation(dy, x, stats, weight, bias, None, mask, eps, activation, negative_slope)

    dbias, dweight = channel_sum(dz), channel_sum(dz * xhat)
    sum_dy, sum_dy_xhat = GroupSum.apply(torch.cat([dbias, dweight]), exchange).chunk(2)
    scale = invstd if weight is None else invstd * weight.double()
    dx = over(scale) * (dz - over(sum_dy / n) - xhat * over(sum_dy_xhat / n))
    return dx.to(x.dtype), dz.to(x.dtype), _like(dweight, weight), _like(dbias, bias)


def _like(grad: Tensor, parameter: Tensor | None) -> Tensor:
    return grad if parameter is None else grad.to(parameter.dtype)
