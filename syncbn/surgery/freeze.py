"""`freeze_bn` and `unfreeze_bn`: batch norms that stay in eval mode, whatever `model.train()` asks for.

Freezing replaces a layer's class by a subclass whose `train` leaves it in eval mode. Torch's layers, this package's and a user's are frozen
by the same means, and stay instances of their class.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .._torch_private import _BatchNorm, _LazyNormBase
from .record import change_class, class_below_parametrization


@dataclass
class Freeze:
    """What `unfreeze_bn` restores. The layer keeps it as `_freeze`."""

    training: bool  # the mode that the layer would have if it were not frozen
    parameters: tuple[str, ...] = ()  # names of those that no longer require a gradient because of the freeze


class Frozen:
    """The first base of a frozen layer's class."""

    _frozen = True
    if TYPE_CHECKING:  # torch.jit.script cannot read the annotation
        _freeze: Freeze

    def train(self: Any, mode: bool = True) -> Any:
        vars(self)["_freeze"] = replace(self._freeze, training=mode)  # a new object: a shallow copy of the layer has the old one, too
        return super().train(False)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Names the class that was frozen, which `_rebuild` freezes again: pickle could not import a class that was made at run time."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        return _rebuild, (function, tuple(_original(a) if a is type(self) else a for a in arguments)), *state


def freeze_bn(model: nn.Module, *, parameters: bool = False) -> nn.Module:
    """Freezes every batch norm of `model`, plain or synchronized, in place, and returns `model`.

    A frozen layer normalizes by its running statistics, does not update them, and exchanges nothing with other ranks. It stays so when
    `model.train()` is called, when the model is converted, reverted, copied or pickled, and, for a `SyncBatchNormalization`, when it is
    called with `training=True`. `update_bn_stats` leaves it alone. It remains an instance of its class, its state dict is the same, and
    fine-tuning code needs no loop over `isinstance`.

    Args:
        model: a model, or a batch norm itself.
        parameters: also freeze the layers' parameters: they require no gradient until `unfreeze_bn`. Do so before the model is wrapped in
            DistributedDataParallel, which waits for the gradients of all parameters that required one when it was made.

    Call it on every rank alike: a layer that is frozen on one rank only would leave the other ranks waiting in its exchange.
    `freeze_bn` itself does not communicate. A layer without running statistics normalizes by this rank's batch, as always in eval mode.

    >>> model = freeze_bn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> model.train()[1]
    FrozenBatchNorm2d(8, eps=1e-05, momentum=0.1, ...)
    >>> model[0].training, model[1].training, isinstance(model[1], nn.BatchNorm2d)
    (True, False, True)
    """
    for layer in _batch_norms(model):
        if not isinstance(layer, Frozen):
            vars(layer)["_freeze"] = Freeze(layer.training)
            layer.train(False)
            change_class(layer, frozen_class(class_below_parametrization(layer)))
        if parameters:
            freeze: Freeze = vars(layer)["_freeze"]
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    parameter.requires_grad = False  # an attribute, because an uninitialized parameter has no requires_grad_()
                    freeze.parameters += (name,)
    return model


def unfreeze_bn(model: nn.Module) -> nn.Module:
    """Undoes `freeze_bn`, in place, and returns `model`.

    Each layer gets the mode that `train()` or `eval()` asked for last, and the parameters that `freeze_bn` froze require a gradient again.

    >>> unfreeze_bn(freeze_bn(nn.BatchNorm2d(8))).training
    True
    """
    for layer in _batch_norms(model):
        if isinstance(layer, Frozen):
            change_class(layer, _original(class_below_parametrization(layer)))
            freeze: Freeze = vars(layer).pop("_freeze")
            layer.train(freeze.training)
            for name, parameter in layer.named_parameters():
                parameter.requires_grad = parameter.requires_grad or name in freeze.parameters
    return model


@contextmanager
def thawed(layer: _BatchNorm) -> Iterator[None]:
    """In this context a frozen layer has its class from before the freeze, and may be given another. Afterwards it is frozen again."""
    frozen = isinstance(layer, Frozen)
    if frozen:
        change_class(layer, _original(class_below_parametrization(layer)))
    try:
        yield
    finally:
        if frozen:
            change_class(layer, frozen_class(class_below_parametrization(layer)))


@functools.cache
def frozen_class(original: Any) -> Any:
    members: dict[str, Any] = {"__module__": original.__module__}  # torch.fx treats modules of torch.nn as leaves by this name
    if issubclass(original, _LazyNormBase) and original.cls_to_become is not None:
        members["cls_to_become"] = frozen_class(original.cls_to_become)
    return type(f"Frozen{original.__name__}", (Frozen, original), members)


def _original(frozen: Any) -> Any:
    return frozen.__bases__[1]


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def _rebuild(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Unpickles a frozen layer."""
    layer = function(*arguments)
    cls: Any = type(layer)
    change_class(layer, frozen_class(cls))
    return layer
