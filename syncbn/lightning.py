"""PyTorch Lightning: a plugin that makes Trainer use this package's layers, on any accelerator, the CPU included.

    trainer = Trainer(strategy="ddp", plugins=[syncbn.lightning.LayerSync()])

Lightning converts when `fit` starts and reverts when it ends. Its own `sync_batchnorm=True` must then be left out.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .convert import convert_sync_batchnorm, revert_sync_batchnorm

# One project under two names, whose classes are not each other's: the one that the program has imported, if any.
if "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules:
    try:
        from lightning.pytorch.plugins import LayerSync as _LayerSync
    except ImportError:
        from pytorch_lightning.plugins import LayerSync as _LayerSync
else:
    from pytorch_lightning.plugins import LayerSync as _LayerSync


class LayerSync(_LayerSync):
    """Trainer's conversion to synchronized batch normalization.

    Args:
        process_group: of the layers, as in `SyncBatchNorm`; a function that makes it, where torch.distributed does not run yet.
        fuse_activation: as in `convert_sync_batchnorm`.
    """

    def __init__(self, process_group: Any = None, *, fuse_activation: bool = False) -> None:
        self.process_group = process_group
        self.fuse_activation = fuse_activation

    def apply(self, model: nn.Module) -> nn.Module:
        group = self.process_group() if callable(self.process_group) else self.process_group
        return convert_sync_batchnorm(model, group, fuse_activation=self.fuse_activation)

    def revert(self, model: nn.Module) -> nn.Module:
        return revert_sync_batchnorm(model)
