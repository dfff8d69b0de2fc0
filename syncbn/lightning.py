"""PyTorch Lightning: a plugin that makes Trainer use this package's layers, on any accelerator, the CPU included.

    trainer = Trainer(strategy="ddp", plugins=[syncbn.lightning.LayerSync()])

Lightning converts when `fit` starts and reverts when it ends. Its own `sync_batchnorm=True` must then be left out.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .surgery.convert import convert_sync_batchnorm, revert_sync_batchnorm

# One project under two names, each with classes of its own. Importing them here would take seconds, and only one is used.
PACKAGES = ("lightning.pytorch.plugins", "pytorch_lightning.plugins")


class LayerSync:
    """Trainer's conversion to synchronized batch normalization.

    Args:
        process_group: of the layers, as in `SyncBatchNorm`; or a function that makes it, if torch.distributed does not run yet.
        fuse_activation: as in `convert_sync_batchnorm`.
    """

    def __init__(self, process_group: Any = None, *, fuse_activation: bool = False) -> None:
        self.process_group = process_group
        self.fuse_activation = fuse_activation

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """`isinstance(plugin, lightning.pytorch.plugins.LayerSync)` asks for this first: by then the package that asks has been imported,
        and the plugin can become one of its own, whichever of the two it is and whenever it was imported."""
        for package in PACKAGES:
            abstract = getattr(sys.modules.get(package), "LayerSync", None)
            if abstract is not None:
                abstract.register(type(self))
        return type(self)

    def apply(self, model: nn.Module) -> nn.Module:
        group = self.process_group() if callable(self.process_group) else self.process_group
        return convert_sync_batchnorm(model, group, fuse_activation=self.fuse_activation)

    def revert(self, model: nn.Module) -> nn.Module:
        return revert_sync_batchnorm(model)
