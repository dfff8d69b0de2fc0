"""Batch norms of other projects that normalize as torch's do and then apply some of their submodules."""

from __future__ import annotations

from torch import nn

# Submodules in the order in which they are applied. By name: nothing of theirs is imported.
_TAILS = {
    "timm.layers.norm_act.BatchNormAct2d": ("drop", "act"),
    "timm.layers.norm_act.SyncBatchNormAct": ("drop", "act"),
}


def tail_of_class(cls: type) -> tuple[str, ...]:
    """The submodules that the forward of `cls` applies after the normalization; none for any class that is not known."""
    definer = next(base for base in cls.__mro__ if "forward" in vars(base))
    return _TAILS.get(f"{definer.__module__}.{definer.__qualname__}", ())


def tail_of(layer: nn.Module) -> tuple[str, ...]:
    """That of a layer, which may have been converted."""
    conversion = vars(layer).get("_conversion")
    return tail_of_class(conversion.original_class if conversion and conversion.original_class else type(layer))
