"""The law: Trainer with the plugin trains as the plain model on the whole batch, and gives the plain model back."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn

pl = pytest.importorskip("pytorch_lightning", reason="the plugin is one of PyTorch Lightning's: pip install pytorch-lightning")
from syncbn.lightning import LayerSync  # noqa: E402

pytestmark = [pytest.mark.process_group, pytest.mark.filterwarnings("ignore")]
ROWS, STEPS = 4, 3


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 1), nn.BatchNorm1d(3)).double()
        self.classes = set()

    def training_step(self, batch, index):
        self.classes |= {type(m) for m in self.net}
        return self.net(batch[0]).tanh().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize("fuse_activation", [False, True], ids=["plain", "fused"])
def test_trainer(world, tmp_path, fuse_activation):
    data = torch.randn(STEPS, world.size, ROWS, 2, 5, dtype=torch.float64) + torch.arange(world.size)[:, None, None, None]
    model = Module()
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
    assert syncbn.SyncBatchNorm in model.classes and nn.BatchNorm1d not in model.classes
    assert type(model.net[1]) is nn.BatchNorm1d and type(model.net[2]) is nn.ReLU and model.net[1].training

    plain = Module()
    optimizer = plain.configure_optimizers()
    for batch in data:
        optimizer.zero_grad()
        plain.training_step([batch.flatten(0, 1)], 0).backward()
        optimizer.step()
    for (name, want), got in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert_close(got, want, 1e-9, name)


def test_a_group_made_when_it_is_needed(world):
    """Trainer starts torch.distributed itself, so a group may come from a function."""
    model = LayerSync(lambda: syncbn.new_group(1)).apply(Module())
    assert model.net[1].process_group.size() == 1
    assert type(LayerSync().revert(model).net[1]) is nn.BatchNorm1d
