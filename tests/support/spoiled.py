"""Data whose variance is hard to sum in float32: far from zero, with zeros or outliers where a kernel may look for a typical value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from syncbn import reference

SHAPES = [(16, 1, 96, 96), (32, 8, 14, 14), (40, 3, 7, 7), (12000, 8), (2000, 64)]
SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean 1e4": lambda x: x + 1e4,
    "zeros in front": lambda x: torch.cat([torch.zeros_like(x[: len(x) // 4]), x[len(x) // 4 :] + 1e3]),
    "zeros in the first sample": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:] + 1e3]),
    "one outlier, in front": lambda x: every(x.numel(), x + 1e3, 1e8),
    "outliers of 1e6": lambda x: every(61, x + 1e3, 1e6),
    "outliers of 1e6, a power of two apart": lambda x: every(64, x + 10, 1e6),
    "outliers of 1e5, a warp apart": lambda x: every(32, x + 1e3, 1e5),
    "constant but for outliers": lambda x: every(64, torch.full_like(x, 1e3), 3e6),
    "zeros in the first steps of 768 threads, then a constant": lambda x: torch.cat(
        [torch.zeros(16 * 768), torch.full((x.numel() - 16 * 768,), 1234.567)]
    ).view_as(x),
}
ALL = list(SPOILED)[:-1]
# The last kind needs a large tensor: a thread that walks over many values must not keep the K that it took from the first ones.
CASES = [*((shape, kind) for shape in SHAPES for kind in ALL), ((1, 1, 900, 900), list(SPOILED)[-1])]


def every(n: int, x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[::n] = value
    return x


def error_of_the_variance(stats: Callable[..., Tensor], kind: str, shape: tuple[int, ...], device: str = "cpu") -> float:
    """The greatest relative error over the channels."""
    x = SPOILED[kind](torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    var = reference.finalize(stats(x.to(device), False, True).cpu(), 0.0)[1]
    want = x.double().movedim(1, 0).flatten(1).var(1, correction=0)
    return float(((var - want).abs() / want.clamp(min=1e-300)).max())
