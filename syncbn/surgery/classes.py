"""The class of a converted layer. Conversion changes the class of a module, so that the module stays the same object.

Python allows this between classes whose instances have the same layout, as those of all modules have. The pickle of an instance of a class
that is made here at run time names the original class.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, fx, nn

from .._torch_private import _BatchNorm, _LazyNormBase
from ..modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .tails import tail_of_class
from .trace import record_in_fx_graph


class BatchNorm(_BatchNorm):
    """Plain batch normalization of any number of dimensions: a layer built as `SyncBatchNorm` reverts to it."""

    def _check_input_dim(self, input: Any) -> None: ...


# The class that instances of a plain class get. nn.SyncBatchNorm is no base of it, because DistributedDataParallel refuses that on the CPU.
SYNCHRONIZED: dict[type[_BatchNorm], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNorm: SyncBatchNorm,
}


@functools.cache
def synchronized_class(original: Any) -> type[SyncBatchNorm]:
    """The class for converted instances of `original`: that of `SYNCHRONIZED`, else a new subclass of `SyncBatchNorm` and `original`.

    With `original` as a base, an instance keeps its other methods and its check of the input's dimensions.
    """
    if original in SYNCHRONIZED:
        return SYNCHRONIZED[original]
    members: dict[str, Any] = {"_check_input_dim": original._check_input_dim, "__reduce_ex__": _reduce_as(original)}
    if issubclass(original, _LazyNormBase) and original.cls_to_become is not None:
        members["cls_to_become"] = synchronized_class(original.cls_to_become)
    if tail := tail_of_class(original):
        members["forward"] = _forward_with(tail)
    return type(f"Sync{original.__name__}", (SyncBatchNorm, original), members)


def plain_class(built: type[SyncBatchNorm]) -> type[_BatchNorm]:
    """The class to which a layer that was built as a `SyncBatchNorm` reverts."""
    return next((plain for plain, synchronized in SYNCHRONIZED.items() if issubclass(built, plain)), BatchNorm)


def _forward_with(tail: tuple[str, ...]) -> Any:
    """A forward that applies the submodules `tail` after the normalization, as the original class does."""

    def forward(self: SyncBatchNorm, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return record_in_fx_graph(self, input)
        y = SyncBatchNorm.forward(self, input)
        for name in tail:
            y = getattr(self, name)(y)
        return y

    return forward


def _reduce_as(original: Any) -> Any:
    """A `__reduce_ex__` that names `original`: pickle could not import a class that was made at run time."""

    def reduce(self: SyncBatchNorm, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (original,), *SyncBatchNorm.__reduce_ex__(self, protocol)[2:]

    return reduce


def _rebuild(original: Any) -> SyncBatchNorm:
    """Unpickles an instance of a class that `synchronized_class` made."""
    cls = synchronized_class(original)
    return cls.__new__(cls)
