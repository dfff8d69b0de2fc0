"""The record of a conversion, which the layer keeps until it is reverted, and the change of a layer's class."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

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


def class_below_parametrization(module: nn.Module) -> Any:
    """The module's class; if torch.nn.utils.parametrize has put one on top of it, the only base of that one."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def change_class(module: nn.Module, cls: Any) -> None:
    """Makes `module` a `cls`, parametrized as before: the class on top holds properties, a refusal of pickle, and a way to deepcopy
    nevertheless."""
    if parametrize.is_parametrized(module):
        kept = {name: value for name, value in vars(type(module)).items() if isinstance(value, property) or name == "__getstate__"}
        if not hasattr(cls, "__deepcopy__"):
            kept["__deepcopy__"] = _deepcopy_of_attributes
        cls = type(f"Parametrized{cls.__name__}", (cls,), kept)
    module.__class__ = cls


def _deepcopy_of_attributes(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = type(module).__new__(type(module))
    memo[id(module)] = new
    vars(new).update(copy.deepcopy(vars(module), memo))
    return new
