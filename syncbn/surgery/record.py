"""The record of a conversion, which the layer keeps until it is reverted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .._torch_private import _BatchNorm


@dataclass
class Conversion:
    """All that `revert_sync_batchnorm` needs to undo `convert_sync_batchnorm` for a layer."""

    original_class: type[_BatchNorm] | None  # None if the layer was built as a SyncBatchNorm
    original_attributes: dict[str, Any]  # values that the conversion replaced
    fused_activation: nn.Module | None = None


def groups_of(module: nn.Module) -> list[Any]:
    """The process group of a layer, and the one that its conversion replaced."""
    conversion = vars(module).get("_conversion")
    replaced = conversion.original_attributes if conversion else {}
    return [getattr(module, "process_group", None), *replaced.values()]
