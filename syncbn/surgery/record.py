"""What a conversion has changed in a layer, kept by the layer itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .._torch_private import _BatchNorm


@dataclass
class Conversion:
    """`revert_sync_batchnorm` needs no more than this to undo what `convert_sync_batchnorm` did to a layer."""

    original_class: type[_BatchNorm] | None  # None if the layer was built as a SyncBatchNorm
    original_attributes: dict[str, Any]  # those that the conversion has replaced
    fused_activation: nn.Module | None = None


def groups_of(module: nn.Module) -> list[Any]:
    """The process group of a layer, and the one that its conversion has replaced."""
    conversion = vars(module).get("_conversion")
    replaced = conversion.original_attributes if conversion else {}
    return [getattr(module, "process_group", None), *replaced.values()]
