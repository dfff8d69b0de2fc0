"""Batch norms of other projects that normalize as torch's do and then apply some of their submodules."""

from __future__ import annotations

from torch import nn

# Submodules in the order in which forward applies them. The classes are given by name so that timm need not be imported.
_TAILS = {
    "timm.layers.norm_act.BatchNormAct2d": ("drop", "act"),
    "timm.layers.norm_act.SyncBatchNormAct": ("drop", "act"),
}


def tail_of_class(cls: type) -> tuple[str, ...]:
    """Names of the submodules that the forward of `cls` applies after the normalization; empty for a class that is not in the table."""
    definer = next(base for base in cls.__mro__ if "forward" in vars(base))
    return _TAILS.get(f"{definer.__module__}.{definer.__qualname__}", ())


def tail_of(layer: nn.Module) -> tuple[str, ...]:
    """`tail_of_class` for a layer, which may be converted."""
    conversion = vars(layer).get("_conversion")
    return tail_of_class(conversion.original_class if conversion and conversion.original_class else type(layer))
