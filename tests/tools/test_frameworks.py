"""With SYNCBN_REPLACE_TORCH=1 frameworks use this package's layers on the CPU, with nothing of theirs changed.

Each script trains on two ranks, whose data differ, and never mentions this package. Moving statistics that are bitwise identical on both
ranks are those of both. The check can fail: without the variable torch's layers refuse the CPU, on a single rank already.
"""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from support.processes import run, torchrun

pytestmark = pytest.mark.world_size(1)

PROLOGUE = """
import atexit, os, sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


@atexit.register
def end():  # without it torch 2.13 aborts now and then when the process ends, with its own layers, too
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def data(rank):
    return torch.randn(4, 3, 8, 8) * (rank + 1) + rank


def train(model, rank, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(data(rank)).square().mean().backward()
        optimizer.step()


def report(model, rank):
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    bits = b"".join(t.detach().numpy().tobytes() for m in layers for t in (m.running_mean, m.running_var))
    kinds = all(isinstance(m, nn.SyncBatchNorm) for m in layers), all(m.running_mean.any() for m in layers)
    sys.stdout.write(f"rank {rank} {len(layers)} {all(kinds)} {hash(bits)}\\n")
    sys.stdout.flush()
"""
TORCHVISION = """
try:
    import torchvision
except (ImportError, RuntimeError):  # made for another build of torch: its operators are missing, and none is called here
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "roi_align", "roi_pool", "deform_conv2d", "ps_roi_align", "ps_roi_pool", "_roi_align_backward", "_roi_pool_backward"):
        library.define(f"{op}(Tensor x) -> Tensor")
    register = torch.library.register_fake
    torch.library.register_fake = lambda name, *a, **k: (lambda f: f) if name.startswith("torchvision::") else register(name, *a, **k)
"""
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
INIT = """
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
"""
SCRIPTS = {  # name: (modules that it needs, whether torchrun starts it, script)
    "torch": ((), True, INIT + "model = nn.SyncBatchNorm.convert_sync_batchnorm(net()); train(DDP(model), rank); report(model, rank)"),
    "lightning": (("lightning",), False, LIGHTNING.format(package="lightning.pytorch", strategy="ddp")),
    "lightning spawn": (("lightning",), False, LIGHTNING.format(package="lightning.pytorch", strategy="ddp_spawn")),
    "lightning under torchrun": (("lightning",), True, LIGHTNING.format(package="lightning.pytorch", strategy="ddp")),
    "pytorch_lightning": (("pytorch_lightning",), False, LIGHTNING.format(package="pytorch_lightning", strategy="ddp")),
    "timm": (
        ("timm", "torchvision"), True, TORCHVISION + INIT + """
import timm
torch.manual_seed(0)
model = timm.layers.convert_sync_batchnorm(timm.create_model("resnet18", num_classes=3))
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank); report(model, rank)
""",
    ),
    "timm, norm and activation in one": (
        ("timm", "torchvision"), True, TORCHVISION + INIT + """
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
        ("fastai", "accelerate"), True, TORCHVISION + """
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
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    file = tmp_path / "script.py"
    file.write_text(PROLOGUE + script)
    ranks = 2 if replaced else 1
    env = installed | {"SYNCBN_REPLACE_TORCH": str(int(replaced)), "RANKS": str(ranks), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = run([*(torchrun(ranks) if by_torchrun else [sys.executable]), str(file)], env=env, cwd=tmp_path, timeout=300)
    if not replaced:
        assert done.returncode != 0 and re.search(REFUSED, done.stdout + done.stderr)
        return
    assert done.returncode == 0, done.stdout + done.stderr
    rows = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("rank "))
    assert [row[0] for row in rows] == ["0", "1"], done.stdout
    assert rows[0][1:] == rows[1][1:] and int(rows[0][1]) > 0 and rows[0][2] == "True", rows


def test_the_scripts_do_not_mention_this_package():
    assert not any("syncbn" in PROLOGUE + script for _, _, script in SCRIPTS.values())
