"""Conversion of a model to synchronized batch normalization, and back. Lossless: only a module's class changes.

Because each batch norm stays the same object, so do its parameters and buffers (optimizers stay valid), hooks, training flag,
extra attributes, and every reference to it, in the model or outside.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch_private import _BatchNorm, _LazyNormBase, change_class, class_below_parametrization, registered_names
from ..comm import check_type
from ..guards import options_of_ours
from ..modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .fuse import Fusible, find_fusible, fuse, unfuse
from .record import Conversion
from .tails import tail_of_class
from .trace import record_in_fx_graph

_TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNorm(_BatchNorm):
    """Plain batch normalization of any number of dimensions: what a layer built as `SyncBatchNorm` reverts to."""

    def _check_input_dim(self, input: Any) -> None: ...


# What torch's classes become. An nn.SyncBatchNorm does not keep its class as a base: DistributedDataParallel refuses it on the CPU.
_SYNCHRONIZED: dict[type[_BatchNorm], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNorm: SyncBatchNorm,
}


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None, *, fuse_activation: bool = False) -> nn.Module:
    """Turns every batch norm in `module` into a `SyncBatchNorm`, in place, and returns `module`.

    `BatchNorm1d/2d/3d`, lazy batch norms, and subclasses that keep torch's forward are converted and remain instances of their class;
    a `torch.nn.SyncBatchNorm` does not, because DistributedDataParallel would refuse it on the CPU. A
    subclass with a forward of its own is left alone, with one warning that names it: its behaviour would be lost. So is one that
    torch.jit has scripted. timm's BatchNormAct2d is converted together with its dropout and activation.

    Args:
        module: a model, or a batch norm itself.
        process_group: of the converted layers, as in `SyncBatchNorm`. None keeps the group of a layer that has one.
        fuse_activation: also make one layer of a batch norm and the ReLU, LeakyReLU or SiLU module after it, if `torch.fx` shows that
            nothing else sees the value in between. The activation module stays in the model, as a node of fx graphs, too, and passes its
            input on. An activation that is called more than once, or after an addition, and `F.relu` stay. If `torch.fx` cannot trace
            `module`, the submodules that it can trace are fused, with a warning that names the line.

    Raises:
        ValueError: `process_group` is of an unknown type.

    >>> convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1]
    SyncBatchNorm2d(8, eps=1e-05, momentum=0.1, ...)
    """
    check_type(process_group)  # an error before anything has changed
    fusible: list[Fusible] = find_fusible(module) if fuse_activation else []
    left_alone = {m.original_name for m in module.modules() if isinstance(m, torch.jit.ScriptModule) and "BatchNorm" in m.original_name}
    batch_norms = list(_batch_norms(module))
    for name, child in batch_norms:
        if isinstance(child, SyncBatchNorm):
            child.process_group = child.process_group if process_group is None else process_group
        elif (type(child).forward in _TORCH_FORWARDS or tail_of_class(type(child))) and not _own_names(child):
            _convert(child, process_group)
        else:
            left_alone.add(type(child).__name__)
            continue
        _name(child, name)
    if left_alone:
        names = ", ".join(sorted(left_alone))
        warnings.warn(f"not converted, because they have a forward or options of their own, or are scripted: {names}", stacklevel=2)
    elif not batch_norms:
        others = sorted({type(m).__name__ for m in module.modules() if "Norm" in type(m).__name__})
        instead = f"its normalization layers are {', '.join(others)}" if others else "it has no normalization layer at all"
        warnings.warn(f"nothing to convert: {type(module).__name__} contains no batch norm; {instead}", stacklevel=2)
    for pair in fusible:
        fuse(pair)
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Undoes `convert_sync_batchnorm`, in place, fused activations included, and returns `module`.

    Each layer becomes exactly what it was converted from. A layer that was built as a `SyncBatchNorm2d` becomes a `BatchNorm2d`, and one
    that was built as a `SyncBatchNorm` a plain batch norm of any number of dimensions. A layer with options that torch's layers do not
    have, or that was built as a subclass of yours, is left alone, with one warning that names it.

    >>> revert_sync_batchnorm(convert_sync_batchnorm(nn.BatchNorm2d(8)))
    BatchNorm2d(8, eps=1e-05, momentum=0.1, ...)
    """
    left_alone = []
    for name, child in _batch_norms(module):
        if isinstance(child, SyncBatchNorm):
            unfuse(child)
            if options_of_ours(child) or _is_of_a_users_class(child):
                left_alone.append(name or type(child).__name__)
            else:
                _revert(child)
    if left_alone:
        warnings.warn(f"not reverted, because torch has no such layer: {', '.join(left_alone)}", stacklevel=2)
    return module


def _is_of_a_users_class(child: SyncBatchNorm) -> bool:
    """Whether the layer was built, and of a class that means something which a plain batch norm would lose."""
    converted = child._conversion is not None and child._conversion.original_class is not None
    return not converted and class_below_parametrization(child) not in _SYNCHRONIZED.values()


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """(dotted name, batch norm), each once: a shared module is met under its first name."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, _BatchNorm))


def _own_names(child: _BatchNorm) -> set[str]:
    """What `child` or its class means something of its own by, and a SyncBatchNorm another thing."""
    names = {"forward", "activation", "negative_slope", "weighting", "unbiased", "layer_name"}
    own = {*vars(child), *registered_names(child)}
    if not tail_of_class(type(child)):
        own |= set(dir(type(child))) - set(dir(nn.SyncBatchNorm))
    return names & own


def _convert(child: _BatchNorm, process_group: Any) -> None:
    attributes = vars(child)
    original = class_below_parametrization(child)
    attributes["_conversion"] = Conversion(original, {key: attributes[key] for key in ("process_group",) if key in attributes})
    change_class(child, _synchronized(original))  # type: ignore[arg-type]  # mypy takes the class for unhashable
    if process_group is not None:
        child.process_group = process_group


def _name(child: Any, name: str) -> None:
    """Names a layer by its place in the model. A name given by hand stays; one that a part of the model gave becomes the whole one's."""
    if name and (not child.layer_name or name.endswith(f".{child.layer_name}")):
        child.layer_name = name


def _revert(child: SyncBatchNorm) -> None:
    attributes = vars(child)
    conversion: Conversion = attributes.pop("_conversion", None) or Conversion(None, {})
    original: Any = conversion.original_class or _plain(type(child))
    for option in ("process_group", "activation", "negative_slope", "weighting", "unbiased", "layer_name"):
        attributes.pop(option, None)
    if issubclass(original, _LazyNormBase) and not isinstance(child, _LazyNormBase):
        original = original.cls_to_become  # it has seen its first input since
    change_class(child, original)
    attributes.update(conversion.original_attributes)


def _plain(built: type[SyncBatchNorm]) -> type[_BatchNorm]:
    """What a layer that was built as a `SyncBatchNorm` reverts to."""
    return next((plain for plain, synchronized in _SYNCHRONIZED.items() if issubclass(built, plain)), BatchNorm)


@functools.cache
def _synchronized(original: Any) -> type[SyncBatchNorm]:
    """The class that an instance of class `original` gets: a SyncBatchNorm with `original` as a base, which keeps its methods and its check
    of the input's dimensions."""
    if original in _SYNCHRONIZED:
        return _SYNCHRONIZED[original]
    members: dict[str, Any] = {
        "_check_input_dim": original._check_input_dim,
        "__reduce_ex__": lambda self, protocol: (_rebuild, (original,), *SyncBatchNorm.__reduce_ex__(self, protocol)[2:]),
    }
    if issubclass(original, _LazyNormBase) and original.cls_to_become is not None:
        members["cls_to_become"] = _synchronized(original.cls_to_become)
    tail = tail_of_class(original)
    if tail:

        def forward(self: SyncBatchNorm, input: Tensor) -> Tensor:
            if isinstance(input, fx.Proxy):
                return record_in_fx_graph(self, input)
            y = SyncBatchNorm.forward(self, input)
            for name in tail:
                y = getattr(self, name)(y)
            return y

        members["forward"] = forward
    return type(f"Sync{original.__name__}", (SyncBatchNorm, original), members)


def _rebuild(original: Any) -> SyncBatchNorm:
    """Unpickles an instance of a class that `_synchronized` made."""
    cls = _synchronized(original)
    return cls.__new__(cls)
