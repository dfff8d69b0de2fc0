"""With SYNCBN_REPLACE_TORCH=1 frameworks use this package's layers on the CPU, with nothing of theirs changed.

Each script trains on two ranks, and never mentions this package. The check can fail: without the variable torch's layers refuse the CPU.
"""

from __future__ import annotations

import re

import pytest

from support.frameworks import INIT, PROLOGUE, TRAINER, assert_synchronized, train

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
SCRIPTS = {  # name: (modules that it needs, whether torchrun starts it, script)
    "torch": ((), True, INIT + "model = nn.SyncBatchNorm.convert_sync_batchnorm(net()); train(DDP(model), rank); report(model, rank)"),
    "lightning": (("lightning",), False, LIGHTNING.format(package="lightning.pytorch", strategy="ddp")),
    "lightning spawn": (("lightning",), False, LIGHTNING.format(package="lightning.pytorch", strategy="ddp_spawn")),
    "lightning under torchrun": (("lightning",), True, LIGHTNING.format(package="lightning.pytorch", strategy="ddp")),
    "pytorch_lightning": (("pytorch_lightning",), False, LIGHTNING.format(package="pytorch_lightning", strategy="ddp")),
    "timm": (
        ("timm", "torchvision"), True, INIT + """
import timm
torch.manual_seed(0)
model = timm.layers.convert_sync_batchnorm(timm.create_model("resnet18", num_classes=3))
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank); report(model, rank)
""",
    ),
    "timm, norm and activation in one": (
        ("timm", "torchvision"), True, INIT + """
import timm
torch.manual_seed(0)
model = timm.layers.convert_sync_batchnorm(timm.create_model("efficientnet_b0", num_classes=3))
assert any(type(m).__name__ == "SyncBatchNormAct" for m in model.modules())
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank); report(model, rank)
""",
    ),
    "monai": (
        ("monai",), True, INIT + """
from monai.networks.nets import UNet
torch.manual_seed(0)
model = UNet(spatial_dims=2, in_channels=3, out_channels=2, channels=(4, 8), strides=(2,), norm="syncbatch")
train(DDP(model), rank); report(model, rank)
""",
    ),
    "ignite": (
        ("ignite",), True, """
import ignite.distributed as idist
def main(local_rank):
    model = idist.auto_model(net(), sync_bn=True)
    train(model, idist.get_rank()); report(model, idist.get_rank())
with idist.Parallel(backend="gloo") as parallel:
    parallel.run(main)
""",
    ),
    "accelerate": (
        ("accelerate",), True, """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(net()))
train(model, accelerator.process_index); report(model, accelerator.process_index)
""",
    ),
    "transformers": (
        ("transformers", "accelerate"),
        True,
        TRAINER.replace("CONVERT", "nn.SyncBatchNorm.convert_sync_batchnorm") + "report(model, rank)",
    ),
    "mmengine": (
        ("mmengine",), True, INIT + """
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
model = convert_sync_batchnorm(net(), implementation="torch")
train(DDP(model), rank); report(model, rank)
assert not any(isinstance(m, nn.SyncBatchNorm) for m in revert_sync_batchnorm(model).modules())
""",
    ),
    "mmcv's registry": (
        ("mmengine", "mmcv"), True, INIT + """
from mmcv.cnn import ConvModule
torch.manual_seed(0)
model = nn.Sequential(ConvModule(3, 4, 1, norm_cfg=dict(type="SyncBN")), ConvModule(4, 4, 1, norm_cfg=dict(type="SyncBN")))
train(DDP(model), rank); report(model, rank)
""",
    ),
    "fastai": (
        ("fastai", "accelerate"), True, """
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


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "torch's own"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_framework_trains_with_synchronized_layers_if_torch_is_replaced(name, replaced, installed, tmp_path):
    modules, by_torchrun, script = SCRIPTS[name]
    env = installed | {"SYNCBN_REPLACE_TORCH": str(int(replaced))}
    ranks = 2 if replaced or name == "ignite" else 1  # ignite converts no model of a single rank
    done = train(modules, script, env, tmp_path, ranks=ranks, by_torchrun=by_torchrun)
    if replaced:
        assert_synchronized(done)
    else:
        assert done.returncode != 0 and re.search(REFUSED, done.stdout + done.stderr)


def test_the_scripts_do_not_mention_this_package():
    assert not any("syncbn" in PROLOGUE + script for _, _, script in SCRIPTS.values())
