"""The lines of docs/frameworks.md that put this package's layers into a framework's model, each in a run of two ranks on the CPU."""

from __future__ import annotations

import pytest

from support.frameworks import INIT, TRAINER, assert_synchronized, train

pytestmark = pytest.mark.world_size(1)

SCRIPTS = {  # name: (modules that it needs, script)
    "accelerate": (
        ("accelerate",), """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
model = accelerator.prepare(syncbn.convert_sync_batchnorm(net()))
train(model, rank)
""",
    ),
    "transformers": (
        ("transformers", "accelerate"), TRAINER.replace("CONVERT", "syncbn.convert_sync_batchnorm"),
    ),
    "timm": (
        ("timm", "torchvision"), INIT + """
import timm
timm.layers.convert_sync_batchnorm = syncbn.convert_sync_batchnorm
from timm.layers import convert_sync_batchnorm  # as in its train.py
torch.manual_seed(0)
model = convert_sync_batchnorm(timm.create_model("efficientnet_b0", num_classes=3))
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank)
""",
    ),
    "torchvision": (
        ("torchvision",), INIT + """
from torchvision.models import resnet18
torch.manual_seed(0)
model = resnet18(norm_layer=syncbn.SyncBatchNorm2d)
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank)
""",
    ),
    "MONAI": (
        ("monai",), INIT + """
from monai.networks.layers import Norm
from monai.networks.nets import UNet
Norm.add_factory_callable("syncbn", lambda dim=None: syncbn.SyncBatchNorm)
torch.manual_seed(0)
model = UNet(spatial_dims=2, in_channels=3, out_channels=2, channels=(4, 8), strides=(2,), norm="syncbn")
train(DDP(model), rank)
""",
    ),
    "segmentation_models_pytorch": (
        ("segmentation_models_pytorch", "timm", "torchvision"), INIT + """
import segmentation_models_pytorch
torch.manual_seed(0)
model = syncbn.convert_sync_batchnorm(segmentation_models_pytorch.Unet("resnet18", encoder_weights=None))
data = lambda rank: torch.randn(4, 3, 64, 64) * (rank + 1) + rank
train(DDP(model), rank)
""",
    ),
    "mmcv's registry": (
        ("mmengine", "mmcv"), INIT + """
import mmcv.cnn
from mmengine.registry import MODELS
MODELS.register_module("SyncBN", module=syncbn.SyncBatchNorm, force=True)
torch.manual_seed(0)
model = nn.Sequential(*(mmcv.cnn.ConvModule(i, 4, 1, norm_cfg=dict(type="SyncBN")) for i in (3, 4)))
train(DDP(model), rank)
""",
    ),
    "mmcv, by the class": (
        ("mmengine", "mmcv"), INIT + """
import mmcv.cnn
torch.manual_seed(0)
model = nn.Sequential(*(mmcv.cnn.ConvModule(i, 4, 1, norm_cfg=dict(type=syncbn.SyncBatchNorm)) for i in (3, 4)))
train(DDP(model), rank)
""",
    ),
    "ignite": (
        ("ignite",), """
import ignite.distributed as idist
def main(local_rank):
    global model, rank
    rank = idist.get_rank()
    model = idist.auto_model(syncbn.convert_sync_batchnorm(net()))
    train(model, rank)
with idist.Parallel(backend="gloo") as parallel:
    parallel.run(main)
""",
    ),
    "fastai": (
        ("fastai", "accelerate"), """
import fastai.distributed
from fastai.basics import DataLoader, DataLoaders, Learner
torch.Tensor.cuda = lambda t, *args, **kwargs: t  # fastai calls .cuda() whatever the device is
from accelerate import Accelerator
rank = Accelerator(cpu=True).process_index
items = [(data(rank)[0], torch.zeros(1)) for _ in range(16)]
loaders = DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=4), device="cpu")
model = syncbn.convert_sync_batchnorm(net())
learner = Learner(loaders, model, loss_func=lambda y, target: y.square().mean(), opt_func=fastai.basics.SGD)
with learner.no_logging(), learner.no_bar(), learner.distrib_ctx(cpu=True, sync_bn=False):
    learner.fit(1)
""",
    ),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_line_makes_a_frameworks_model_train_with_synchronized_layers(name, forks, installed, tmp_path, monkeypatch):
    modules, script = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    assert_synchronized(train(modules, f"import syncbn\n{script}\nreport(model, rank, syncbn.SyncBatchNorm)\n", installed, forks))
