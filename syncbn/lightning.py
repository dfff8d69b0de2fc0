"""PyTorch Lightning: a plugin that makes Trainer use this package's layers, on the CPU, too.

    trainer = Trainer(strategy="ddp", plugins=[syncbn.lightning.LayerSync()])

Lightning's strategies for DDP and FSDP convert when `fit` starts and revert when it ends; its other strategies ignore the plugin. Leave out
Lightning's flag `sync_batchnorm=True`, which Trainer refuses together with this plugin.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .surgery.convert import convert_sync_batchnorm, revert_sync_batchnorm

# Lightning ships as two packages with distinct classes. Importing them here would take seconds, and a program uses only one.
PACKAGES = ("lightning.pytorch.plugins", "pytorch_lightning.plugins")


class LayerSync:
    """The Trainer plugin that converts a model to synchronized batch normalization, and back.

    Args:
        process_group: of the layers, as in `SyncBatchNorm`; or a function that creates it once torch.distributed is initialized.
        fuse_activation: as in `convert_sync_batchnorm`.
    """

    def __init__(self, process_group: Any = None, *, fuse_activation: bool = False) -> None:
        self.process_group = process_group
        self.fuse_activation = fuse_activation

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """`isinstance(plugin, lightning.pytorch.plugins.LayerSync)` reads this attribute. By then the package that asks has been
        imported, so this class can register with it, whichever of the two it is and in whatever order the imports ran."""
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
