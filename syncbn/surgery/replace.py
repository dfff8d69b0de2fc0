"""`replace_torch`: torch.nn.SyncBatchNorm becomes this package's layer, for frameworks that convert models by themselves.

torch's class stays, loses its methods, and gets `SyncBatchNorm` as its base. So names that were bound before, subclasses, registries,
isinstance and pickles remain valid: they all refer to the class itself.
"""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import nn

from .._torch_private import is_torchs_layer_replaced, set_base_of_torchs_layer, set_refusal_of_cpu_by_ddp
from ..modules import SyncBatchNorm
from .convert import name_layers
from .freeze import Frozen, freeze_bn

_removed: dict[str, Any] = {}  # methods of torch's class


def replace_torch() -> None:
    """Makes `torch.nn.SyncBatchNorm` this package's layer in this process, for existing and new instances and for its subclasses.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` then makes such layers, and DistributedDataParallel accepts them on the CPU. With the
    environment variable SYNCBN_REPLACE_TORCH=1, `import torch` does this in every process of a job, which reaches frameworks that start
    their own processes. Do it on every rank alike: torch's own layers exchange something else. A second call has no effect.

    Raises:
        RuntimeError: Python refuses to change the base of torch's class, as after the conversion of a subclass of it; nothing is replaced.

    >>> replace_torch()
    >>> layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(8))
    >>> type(layer) is nn.SyncBatchNorm, isinstance(layer, SyncBatchNorm)
    (True, True)
    >>> restore_torch()
    >>> isinstance(layer, SyncBatchNorm)
    False
    """
    if is_torchs_layer_replaced():
        return
    try:
        set_base_of_torchs_layer(SyncBatchNorm)
    except TypeError as error:
        raise RuntimeError(
            f"torch.nn.SyncBatchNorm cannot be replaced ({error}), because of the version of Python or torch, or because"
            " syncbn.convert_sync_batchnorm has converted a subclass of it: replace it first, or convert models with that function"
        ) from error
    for name, value in list(vars(nn.SyncBatchNorm).items()):
        if isinstance(value, (types.FunctionType, classmethod)):
            _removed[name] = value
            delattr(nn.SyncBatchNorm, name)
    nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(_convert)  # type: ignore[method-assign, assignment]
    set_refusal_of_cpu_by_ddp(False)


def restore_torch() -> None:
    """Undoes `replace_torch`. Existing instances of `torch.nn.SyncBatchNorm` are torch's layers again. Without a replacement, no effect.

    >>> restore_torch()
    """
    if is_torchs_layer_replaced():
        set_base_of_torchs_layer(None)
        for name, value in _removed.items():
            setattr(nn.SyncBatchNorm, name, value)
        _removed.clear()
        set_refusal_of_cpu_by_ddp(True)


def _convert(cls: Any, module: nn.Module, process_group: Any = None) -> nn.Module:
    """torch's `convert_sync_batchnorm`, which calls itself for each child. Layers that synchronize already are kept with their options."""
    if isinstance(module, SyncBatchNorm):
        if process_group is not None:
            module.process_group = process_group
        return module
    converted: nn.Module = _removed["convert_sync_batchnorm"].__func__(cls, module, process_group)
    if isinstance(module, Frozen) and converted is not module:
        freeze_bn(converted)
        vars(converted)["_freeze"] = copy.copy(module._freeze)
    name_layers(converted)
    return converted
