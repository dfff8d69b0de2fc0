"""Conversion of a model to synchronized batch normalization, and back, without loss.

Only the class of a batch norm changes. It stays the same object, with its parameters and buffers (optimizers stay valid), hooks, training
flag and extra attributes, and every reference to it, inside the model or outside, stays valid.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._torch_private import _BatchNorm, _LazyNormBase, registered_names
from ..comm import check_type
from ..guards import options_of_ours
from ..modules import SyncBatchNorm
from .classes import SYNCHRONIZED, plain_class, synchronized_class
from .freeze import thawed
from .fuse import Fusible, find_fusible, fuse, unfuse
from .record import Conversion, change_class, class_below_parametrization
from .tails import tail_of_class

_TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None, *, fuse_activation: bool = False) -> nn.Module:
    """Turns every batch norm in `module` into a `SyncBatchNorm`, in place, and returns `module`.

    `BatchNorm1d/2d/3d`, lazy batch norms, and subclasses that keep torch's forward are converted and remain instances of their class. A
    `torch.nn.SyncBatchNorm` is converted, too, but is then no instance of its class, because DistributedDataParallel would refuse it on
    the CPU, as it does a subclass. A layer is left alone, with one warning that names its class, if it overrides forward or has an
    attribute with the name of an option of `SyncBatchNorm`, because its behaviour would be lost. So is a batch norm that torch.jit has
    scripted. timm's BatchNormAct2d and SyncBatchNormAct are converted, and keep their own dropout and activation.

    Args:
        module: a model, or a batch norm itself.
        process_group: of the converted layers, as in `SyncBatchNorm`. None keeps the group of a layer that has one.
        fuse_activation: also fuse each batch norm with the ReLU, LeakyReLU or SiLU module after it, if `torch.fx` shows that nothing else
            uses the value in between. The activation module then becomes an identity; it stays in the model and is still a node of fx
            graphs. An activation that is called more than once or after an addition, and `F.relu`, are not fused. If `torch.fx` cannot
            trace `module`, the submodules that it can trace are fused, with a warning that names the line.

    Raises:
        ValueError: `process_group` is of an unknown type.

    >>> convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1]
    SyncBatchNorm2d(8, eps=1e-05, momentum=0.1, ...)
    """
    check_type(process_group)  # first, so that an error leaves the model unchanged
    fusible: list[Fusible] = find_fusible(module) if fuse_activation else []
    left_alone = {m.original_name for m in module.modules() if isinstance(m, torch.jit.ScriptModule) and "BatchNorm" in m.original_name}
    batch_norms = list(_batch_norms(module))
    for name, child in batch_norms:
        with thawed(child):
            if _convert(child, process_group):
                _set_name(child, name)
            else:
                left_alone.add(type(child).__name__)
    if left_alone:
        names = ", ".join(sorted(left_alone))
        warnings.warn(
            "not converted, because they override forward, have an attribute named like an option of SyncBatchNorm (activation, ...),"
            f" or are scripted: {names}",
            stacklevel=2,
        )
    elif not batch_norms:
        others = sorted({type(m).__name__ for m in module.modules() if "Norm" in type(m).__name__})
        instead = f"its normalization layers are {', '.join(others)}" if others else "it has no normalization layer at all"
        warnings.warn(f"nothing to convert: {type(module).__name__} contains no batch norm; {instead}", stacklevel=2)
    for pair in fusible:
        fuse(pair)
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Undoes `convert_sync_batchnorm`, in place, fused activations included, and returns `module`.

    Each converted layer becomes exactly the layer that it was. A layer that was built as a `SyncBatchNorm2d` becomes a `BatchNorm2d`, and
    one that was built as a `SyncBatchNorm` a plain batch norm of any number of dimensions. A layer with options that torch's layers do
    not have, or that was built as a subclass of yours, is left alone, with one warning that names it: a plain batch norm would lose the
    option or your subclass's behaviour.

    >>> revert_sync_batchnorm(convert_sync_batchnorm(nn.BatchNorm2d(8)))
    BatchNorm2d(8, eps=1e-05, momentum=0.1, ...)
    """
    left_alone = []
    for name, child in _batch_norms(module):
        if isinstance(child, SyncBatchNorm):
            unfuse(child)
            with thawed(child):
                if isinstance(child, nn.SyncBatchNorm) and not _is_converted(child):  # torch's, which replace_torch makes a SyncBatchNorm
                    continue
                if options_of_ours(child) or not (_is_converted(child) or class_below_parametrization(child) in SYNCHRONIZED.values()):
                    left_alone.append(name or type(child).__name__)
                else:
                    _revert(child)
    if left_alone:
        names = ", ".join(left_alone)
        warnings.warn(f"not reverted, because a plain batch norm would lose an option or your subclass's behaviour: {names}", stacklevel=2)
    return module


def _is_converted(child: SyncBatchNorm) -> bool:
    """Whether the layer was converted rather than built."""
    return child._conversion is not None and child._conversion.original_class is not None


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """(dotted name, batch norm), each once: a module that is registered twice has its first name."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, _BatchNorm))


def _conflicting_names(child: _BatchNorm) -> set[str]:
    """Attributes that `child` or its class already uses with a different meaning than SyncBatchNorm."""
    in_use = {*vars(child), *registered_names(child)}
    if not tail_of_class(type(child)):
        in_use |= set(dir(type(child))) - set(dir(_BatchNorm))
    return {"forward", "activation", "negative_slope", "weighting", "unbiased", "layer_name"} & in_use


def _convert(child: _BatchNorm, process_group: Any) -> bool:
    """Makes `child` synchronized, in `process_group` unless that is None. Returns False, changing nothing, if it would lose behaviour."""
    if not isinstance(child, SyncBatchNorm):
        if _conflicting_names(child) or not (type(child).forward in _TORCH_FORWARDS or tail_of_class(type(child))):
            return False
        _synchronize(child)
    if process_group is not None:
        child.process_group = process_group
    return True


def _synchronize(child: _BatchNorm) -> None:
    attributes = vars(child)
    original = class_below_parametrization(child)
    attributes["_conversion"] = Conversion(original, {key: attributes[key] for key in ("process_group",) if key in attributes})
    change_class(child, synchronized_class(original))  # type: ignore[arg-type]  # mypy believes that a class is not hashable


def name_layers(module: nn.Module) -> None:
    """Gives each synchronized layer its dotted name in `module`, for messages and for the signature that ranks compare."""
    for name, child in _batch_norms(module):
        if isinstance(child, SyncBatchNorm):
            _set_name(child, name)


def _set_name(child: Any, name: str) -> None:
    """Sets the layer's dotted name in the model. A name that is the end of this one comes from the conversion of a submodule and is
    replaced. Any other stays: it was set by hand, or by the conversion of a larger module."""
    if name and (not child.layer_name or name.endswith(f".{child.layer_name}")):
        child.layer_name = name


def _revert(child: SyncBatchNorm) -> None:
    attributes = vars(child)
    conversion: Conversion = attributes.pop("_conversion", None) or Conversion(None, {})
    original: Any = conversion.original_class or plain_class(type(child))
    for option in ("process_group", "activation", "negative_slope", "weighting", "unbiased", "layer_name"):
        attributes.pop(option, None)
    if issubclass(original, _LazyNormBase) and not isinstance(child, _LazyNormBase):
        original = original.cls_to_become  # materialized since conversion
    change_class(child, original)
    attributes.update(conversion.original_attributes)
