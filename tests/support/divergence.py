"""Ranks that exchange different things with the same number of values, which no backend notices."""

from __future__ import annotations

from collections.abc import Callable

import torch

from syncbn import SyncBatchNorm

from .world import World


def named(name: str, world: World, channels: int = 3, **options) -> SyncBatchNorm:
    layer = SyncBatchNorm(channels, process_group=world.group, **options)
    layer.layer_name = name
    return layer


def batch(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)


def another_group(world: World) -> object:
    """Another group of all ranks."""
    return torch.distributed.new_group() if world.group is None else world.group.Dup()


# name -> what a rank does with the layers a and b, each with a batch `input` and its output `kept`; `odd` is True on one rank.
DIVERGENCES: dict[str, Callable] = {
    "layers of equal C in another order": lambda odd, a, b: a(b(batch())) if odd else b(a(batch())),
    "a skipped layer": lambda odd, a, b: b(batch()) if odd else b(a(batch())),
    "another dtype": lambda odd, a, b: a(batch(torch.float64 if odd else torch.float32)),
    "another eps": lambda odd, a, b: setattr(a, "eps", 1e-3 if odd else 1e-5) or a(batch()),
    "backward against backward of another": lambda odd, a, b: torch.autograd.grad((b if odd else a).kept.sum(), (b if odd else a).input),
}
