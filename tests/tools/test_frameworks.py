"""With SYNCBN_REPLACE_TORCH=1 frameworks use this package's layers on the CPU, with nothing of theirs changed.

With the variable, each script trains on two ranks. No script mentions this package. The check can fail: without the variable, torch's
layers refuse the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from support.forks import ForkServer, fork_server
from support.frameworks import INIT, PROLOGUE, TRAINER, assert_synchronized, output, train

pytestmark = pytest.mark.world_size(1)

LIGHTNING = """
import warnings; warnings.simplefilter("ignore")
import {package} as pl

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()
    def training_step(self, batch, index):
        return self.net(data(self.global_rank)).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
    def on_train_end(self):
        report(self.net, self.global_rank)

if __name__ == "__main__":
    trainer = pl.Trainer(accelerator="cpu", devices=int(os.environ["RANKS"]), strategy="{strategy}", sync_batchnorm=True, max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(8, 1), batch_size=2))
"""
SCRIPTS = {  # name: (modules that it needs, what starts its ranks, script)
    "torch": ((), "forks", INIT + "model = nn.SyncBatchNorm.convert_sync_batchnorm(net()); train(DDP(model), rank); report(model, rank)"),
    "lightning": (("lightning",), "itself", LIGHTNING.format(package="lightning.pytorch", strategy="ddp")),
    "lightning spawn": (("lightning",), "itself", LIGHTNING.format(package="lightning.pytorch", strategy="ddp_spawn")),
    "lightning under torchrun": (("lightning",), "torchrun", LIGHTNING.format(package="lightning.pytorch", strategy="ddp")),
    "pytorch_lightning": (("pytorch_lightning",), "itself", LIGHTNING.format(package="pytorch_lightning", strategy="ddp")),
    "timm": (
        ("timm", "torchvision"), "forks", INIT + """
import timm
torch.manual_seed(0)
model = timm.layers.convert_sync_batchnorm(timm.create_model("resnet18", num_classes=3))
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank); report(model, rank)
""",
    ),
    "timm, norm and activation in one": (
        ("timm", "torchvision"), "forks", INIT + """
import timm
torch.manual_seed(0)
model = timm.layers.convert_sync_batchnorm(timm.create_model("efficientnet_b0", num_classes=3))
assert any(type(m).__name__ == "SyncBatchNormAct" for m in model.modules())
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank); report(model, rank)
""",
    ),
    "monai": (
        ("monai",), "forks", INIT + """
from monai.networks.nets import UNet
torch.manual_seed(0)
model = UNet(spatial_dims=2, in_channels=3, out_channels=2, channels=(4, 8), strides=(2,), norm="syncbatch")
train(DDP(model), rank); report(model, rank)
""",
    ),
    "ignite": (
        ("ignite",), "forks", """
import ignite.distributed as idist
def main(local_rank):
    model = idist.auto_model(net(), sync_bn=True)
    train(model, idist.get_rank()); report(model, idist.get_rank())
with idist.Parallel(backend="gloo") as parallel:
    parallel.run(main)
""",
    ),
    "accelerate": (
        ("accelerate",), "forks", """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(net()))
train(model, accelerator.process_index); report(model, accelerator.process_index)
""",
    ),
    "transformers": (
        ("transformers", "accelerate"),
        "forks",
        TRAINER.replace("CONVERT", "nn.SyncBatchNorm.convert_sync_batchnorm") + "report(model, rank)",
    ),
    "mmengine": (
        ("mmengine",), "forks", INIT + """
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
model = convert_sync_batchnorm(net(), implementation="torch")
train(DDP(model), rank); report(model, rank)
assert not any(isinstance(m, nn.SyncBatchNorm) for m in revert_sync_batchnorm(model).modules())
""",
    ),
    "mmcv's registry": (
        ("mmengine", "mmcv"), "forks", INIT + """
from mmcv.cnn import ConvModule
torch.manual_seed(0)
model = nn.Sequential(ConvModule(3, 4, 1, norm_cfg=dict(type="SyncBN")), ConvModule(4, 4, 1, norm_cfg=dict(type="SyncBN")))
train(DDP(model), rank); report(model, rank)
""",
    ),
    "fastai": (
        ("fastai", "accelerate"), "forks", """
import fastai.distributed
from fastai.basics import DataLoader, DataLoaders, Learner
torch.Tensor.cuda = lambda t, *args, **kwargs: t  # fastai calls .cuda() whatever the device is
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
items = [(data(rank)[0], torch.zeros(1)) for _ in range(16)]
loss = lambda y, target: y.square().mean()
loaders = DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=4), device="cpu")
learner = Learner(loaders, net(), loss_func=loss, opt_func=fastai.basics.SGD)
with learner.no_logging(), learner.no_bar(), learner.distrib_ctx(cpu=True):
    learner.fit(1)
report(learner.model, rank)
""",
    ),
}  # fmt: skip
REFUSED = r"SyncBatchNorm layers only work with GPU modules|SyncBatchNorm expected input tensor to be on GPU"


@pytest.fixture(scope="module")
def servers(forks: ForkServer, installed: dict[str, str]) -> Iterator[dict[bool, ForkServer]]:
    """{whether `import torch` has replaced torch's class: the server whose forks start after that import}"""
    with fork_server(installed | {"SYNCBN_REPLACE_TORCH": "1"}) as replaced:
        yield {True: replaced, False: forks}


ANOTHER_STARTER = ("lightning spawn", "lightning under torchrun")  # torch's layers refuse the CPU as in "lightning"
RUNS = {name: (name, True) for name in SCRIPTS}
RUNS |= {f"{name}, torch's own": (name, False) for name in SCRIPTS if name not in ANOTHER_STARTER}


@pytest.mark.parametrize(
    "name, replaced",
    [pytest.param(*run, id=id, marks=[pytest.mark.nightly] if SCRIPTS[run[0]][0] else []) for id, run in RUNS.items()],
)
def test_a_framework_trains_with_synchronized_layers_if_torch_is_replaced(name, replaced, servers, installed, tmp_path, monkeypatch):
    modules, starter, script = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    env = installed | {"SYNCBN_REPLACE_TORCH": str(int(replaced))}
    ranks = 2 if replaced or name == "ignite" else 1  # ignite converts no model in a single process
    ended = train(modules, script, env, servers[replaced], ranks=ranks, starter=starter)
    if replaced:
        assert_synchronized(ended)
    else:
        assert all(each.returncode != 0 for each in ended) and re.search(REFUSED, output(ended))


def test_the_scripts_do_not_mention_this_package():
    assert not any("syncbn" in PROLOGUE + script for _, _, script in SCRIPTS.values())
