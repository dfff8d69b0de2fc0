"""A Trainer with the plugin trains a model as a single process trains the plain model, and gives the plain model back."""

from __future__ import annotations

import abc
import importlib
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from support.models import two_norms
from support.oracle import assert_close
from syncbn.lightning import PACKAGES, LayerSync

ROWS, STEPS = 4, 3


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    """Lightning, under either name of its package."""
    return pytest.importorskip(request.param, reason=f"needs {request.param}: pip install lightning pytorch-lightning")


def module(pl):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.classes = set()

        def training_step(self, batch, index):
            self.classes |= {type(m) for m in self.net}
            return self.net(batch[0]).tanh().square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    return Module()


def net() -> nn.Sequential:
    return two_norms(1, (2, 4, 3)).double()


@pytest.mark.process_group
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fuse_activation", [False, True], ids=["plain", "fused"])
def test_trainer_trains_like_one_process(world, tmp_path, pl, fuse_activation):
    data = torch.randn(STEPS, world.size, ROWS, 2, 5, dtype=torch.float64) + torch.arange(world.size)[:, None, None, None]
    model = module(pl)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world.size,
        strategy="ddp",
        max_epochs=1,
        plugins=[LayerSync(fuse_activation=fuse_activation)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(TensorDataset(data[:, world.rank].flatten(0, 1)), batch_size=ROWS))
    assert syncbn.SyncBatchNorm1d in model.classes and nn.BatchNorm1d not in model.classes
    assert type(model.net[1]) is nn.BatchNorm1d and type(model.net[2]) is nn.ReLU and model.net[1].training

    plain = module(pl)
    optimizer = plain.configure_optimizers()
    for batch in data:
        optimizer.zero_grad()
        plain.training_step([batch.flatten(0, 1)], 0).backward()
        optimizer.step()
    for (name, want), got in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert_close(got, want, 1e-9, name)


@pytest.mark.process_group
def test_process_group_may_be_a_factory(world):
    """Trainer starts torch.distributed itself, so a group may come from a function."""
    model = LayerSync(lambda: syncbn.new_group(1)).apply(net())
    assert model[1].process_group.size() == 1
    assert type(LayerSync().revert(model)[1]) is nn.BatchNorm1d


@pytest.mark.world_size(1)
@pytest.mark.parametrize("package", PACKAGES)
def test_the_plugin_is_an_instance_of_the_packages_class_imported_before_it_or_after(package, monkeypatch):
    """Each package has a class LayerSync, unrelated to the other's."""

    class Theirs(abc.ABC):
        @abc.abstractmethod
        def apply(self, model): ...

    for name in PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    early = syncbn.lightning.LayerSync()
    assert not isinstance(early, Theirs)
    stub = types.ModuleType(package)
    stub.LayerSync = Theirs
    monkeypatch.setitem(sys.modules, package, stub)
    assert isinstance(early, Theirs) and isinstance(LayerSync(), Theirs) and not isinstance(object(), Theirs)
    assert isinstance(early, LayerSync) and not isinstance(nn.ReLU(), LayerSync)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("package", PACKAGES)
def test_the_plugin_is_an_instance_of_the_real_class_of_each_package(package):
    plugins = pytest.importorskip(package, reason=f"needs {package}")
    assert isinstance(LayerSync(), plugins.LayerSync)
    assert importlib.import_module("syncbn").lightning.LayerSync is LayerSync
