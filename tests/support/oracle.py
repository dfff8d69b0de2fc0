"""The expected result: plain batch normalization of the whole batch, in float64, in one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from support.closeness import assert_within

# Of a result's greatest magnitude. float64: sums of a few hundred values. float32: a handful of roundings of 6e-8 each.
# 16 bits: one rounding, half a unit in the last place, and what float32 adds.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}


@dataclass
class Result:
    """What one training step over the whole batch gives: gradients of weight and bias are sums over the batch."""

    y: Tensor
    dx: Tensor
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    terms: dict[str, Tensor]  # magnitudes of the terms of dx, dweight and dbias: terms may cancel, and their rounding errors remain


def activate(z: Tensor, activation: str | None, negative_slope: float = 0.01) -> Tensor:
    if activation is None:
        return z
    return F.leaky_relu(z, negative_slope) if activation == "leaky_relu" else getattr(F, activation)(z)


def batch_norm_step(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    unbiased: bool = True,
) -> Result:
    x, residual, weight, bias = (None if t is None else t.detach().cpu().double().requires_grad_() for t in (x, residual, weight, bias))
    running_mean, running_var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
    z = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    if not unbiased:
        n = x.numel() // x.shape[1]
        running_var = 1 - momentum + (running_var - (1 - momentum)) * (n - 1) / n
    z = z if residual is None else z + residual
    z.retain_grad()
    y = activate(z, activation)
    y.backward(dy.cpu().double())
    var = x.detach().movedim(1, 0).flatten(1).var(1, unbiased=False)
    scale = (1.0 if weight is None else weight.detach()) / (var + eps).sqrt()
    by_channel = lambda t: t.detach().movedim(1, 0).flatten(1)  # noqa: E731
    dz, xmu = by_channel(z.grad), by_channel(x) - by_channel(x).mean(1, keepdim=True)
    terms = {
        "dx": dz.abs().amax(1) * scale,
        "dweight": (dz * xmu).abs().sum(1) / (var + eps).sqrt(),
        "dbias": dz.abs().sum(1),
    }
    grads = [None if t is None else t.grad for t in (residual, weight, bias)]
    return Result(y.detach(), x.grad, *grads, running_mean, running_var, terms)


def rank_weighted_moments(whole: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """mean and biased variance [C] of whole [N, C, *] if all ranks have equal weight: the mean of the ranks' means, and the mean of their
    mean squares minus mean². Ranks without samples do not count."""
    dims = [0, *range(2, whole.dim())]
    parts = [part for part in whole.split(counts) if len(part)]
    mean = torch.stack([part.mean(dims) for part in parts]).mean(0)
    return mean, torch.stack([part.square().mean(dims) for part in parts]).mean(0) - mean.square()


def relative_error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """max |got - want| / max |scale|: one number, NaN if `got` has a NaN, infinite if it has an infinity, 0 for empty tensors. `scale` is
    `want` unless given: the whole batch's values, if `want` is one rank's."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    if want.numel() == 0:
        return 0.0
    scale = want if scale is None else scale
    return ((got.detach().to(want.device, torch.float64) - want).abs().max() / scale.double().abs().max().clamp(min=1e-300)).item()


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str, scale: Tensor | None = None) -> None:
    """relative_error(got, want, scale) <= tolerance; the error names the first element that is off."""
    scale = want if scale is None else scale
    greatest = scale.double().abs().max().clamp(min=1e-300) if want.numel() else 0.0
    assert_within(got, want, tolerance * greatest, what)
