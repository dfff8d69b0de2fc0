"""Synchronized batch normalization for PyTorch: `BatchNorm` over the batches of all ranks."""

from . import environment, native
from . import lightning as lightning
from .bn_stats import update_bn_stats
from .checkpoint import checkpoint_contexts
from .comm.agreement import RankMismatchError
from .comm.groups import new_group
from .comm.rendezvous import init_process_group
from .functional import sync_batch_norm
from .join import join
from .keras import SyncBatchNormalization
from .modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .recompute import recompute_outputs
from .surgery.convert import convert_sync_batchnorm, revert_sync_batchnorm
from .surgery.fold import fold_batchnorm
from .surgery.freeze import freeze_bn, unfreeze_bn
from .surgery.replace import replace_torch, restore_torch

__all__ = [
    "RankMismatchError",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "SyncBatchNormalization",
    "checkpoint_contexts",
    "convert_sync_batchnorm",
    "fold_batchnorm",
    "freeze_bn",
    "init_process_group",
    "join",
    "new_group",
    "recompute_outputs",
    "replace_torch",
    "restore_torch",
    "revert_sync_batchnorm",
    "sync_batch_norm",
    "unfreeze_bn",
    "update_bn_stats",
]
__version__ = "0.1.0"
native.warn()  # after the imports: if a warning filter makes an error of it, no submodule is left half imported
if environment.settings.replace_torch:
    replace_torch()
    environment.announce("syncbn: SYNCBN_REPLACE_TORCH=1 makes torch.nn.SyncBatchNorm the layer of this package")


def __dir__() -> list[str]:
    """The public names; submodules can be imported all the same."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
