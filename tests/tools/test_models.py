"""Three training steps of a converted real-world model match the plain model on the whole batch.

Models come from their libraries' configurations, small and with random weights. docs/models.md lists them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector

import syncbn
from support.oracle import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-7  # float64, three steps: 1e-16 grows through some tens of layers and their statistics
COUNTS = {1: (4,), 2: (3, 1)}


def resnet(hf: Any) -> nn.Module:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    return hf.ResNetForImageClassification(config)


def regnet(hf: Any) -> nn.Module:
    config = hf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=3)
    return hf.RegNetForImageClassification(config)


def mobilenet_v2(hf: Any) -> nn.Module:
    config = hf.MobileNetV2Config(depth_multiplier=0.25, classifier_dropout_prob=0.0, num_labels=3)
    return hf.MobileNetV2ForSemanticSegmentation(config)


def efficientnet(hf: Any) -> nn.Module:
    config = hf.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, num_labels=3, dropout_rate=0.0, drop_connect_rate=0.0
    )
    return hf.EfficientNetForImageClassification(config)


def segformer(hf: Any) -> nn.Module:
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        num_labels=3,
    )
    return hf.SegformerForSemanticSegmentation(config)


def upernet(hf: Any) -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = hf.UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, num_labels=3)
    return hf.UperNetForSemanticSegmentation(config)


def levit(hf: Any) -> nn.Module:
    config = hf.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[1, 1, 1],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        drop_path_rate=0,
        num_labels=3,
    )
    return hf.LevitForImageClassification(config)


def rt_detr_v2(hf: Any) -> nn.Module:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = hf.RTDetrV2Config(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[8, 16, 16],
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        decoder_layers=2,
        num_queries=5,
        num_denoising=0,
        num_labels=3,
    )
    return hf.RTDetrV2ForObjectDetection(config)


def unet_3d(monai: Any) -> nn.Module:
    return monai.networks.nets.UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, norm="batch", dropout=0.0)


def segresnet(monai: Any) -> nn.Module:
    return monai.networks.nets.SegResNet(3, init_filters=4, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,), norm="batch")


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What the model returns for each sample, [N, *]."""
    y = model(x)
    if isinstance(y, Tensor):
        return y
    parts = [y[name] for name in ("logits", "pred_boxes") if name in y]
    return torch.cat([part.flatten(1) for part in parts], 1)


CASES: list[tuple[str, Callable[[Any], nn.Module], tuple[int, ...]]] = [
    ("transformers", resnet, (3, 32, 32)),
    ("transformers", regnet, (3, 32, 32)),
    ("transformers", mobilenet_v2, (3, 64, 64)),
    ("transformers", efficientnet, (3, 32, 32)),
    ("transformers", levit, (3, 64, 64)),
    ("transformers", segformer, (3, 32, 32)),
    ("transformers", upernet, (3, 64, 64)),
    ("transformers", rt_detr_v2, (3, 64, 64)),
    ("monai", unet_3d, (1, 8, 8, 8)),
    ("monai", segresnet, (1, 8, 8, 8)),
]


def step(model: nn.Module, x: Tensor, samples: int, all_gather: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """One step of SGD on a mean of squares over the samples of all ranks; the ranks' gradients are added up. Returns the outputs."""
    y = outputs(model, x)
    (y.square().sum() / (samples * y[0].numel())).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = parameters_to_vector([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters])
    total = torch.stack(all_gather(grads)).sum(0)
    with torch.no_grad():
        for p, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            p -= 0.01 * grad.view_as(p)
            p.grad = None
    return y.detach()


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize(("library", "build", "shape"), CASES, ids=[build.__name__ for _, build, _ in CASES])
def test_three_steps_on_the_ranks_equal_three_on_the_whole_batch(world, library, build, shape):
    library = pytest.importorskip(library, reason=f"models of {library} need it")
    torch.manual_seed(0)
    plain = build(library).double().train()
    classes = [type(m) for m in plain.modules()]
    norms = sum(isinstance(m, _BatchNorm) for m in plain.modules())
    assert norms > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layer that is left alone is an error
        model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain), world.group)
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()) == norms
    counts = COUNTS[world.size]
    for _ in range(3):
        whole = torch.randn(sum(counts), *shape, dtype=torch.float64)
        want = step(plain, whole, sum(counts), lambda t: [t])
        got = step(model, world.mine(whole, counts), sum(counts), world.all_gather)
        assert_close(got, world.mine(want, counts), TOLERANCE, "outputs", want)
    for want, got in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(want, _BatchNorm):  # a mean may be 0 by construction: its error is measured in standard deviations
            assert_close(got.running_mean, want.running_mean, TOLERANCE, "running_mean", want.running_var.sqrt())
            assert_close(got.running_var, want.running_var, TOLERANCE, "running_var")
    model = syncbn.revert_sync_batchnorm(model)
    assert [type(m) for m in model.modules()] == classes
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert torch.equal(outputs(plain.eval(), x), outputs(model.eval(), x))


AT_LEAST = {  # (activations fused, batch norms folded) with transformers 5.23 or 5.24 and monai 1.6
    resnet: (7, 11),
    regnet: (5, 9),
    efficientnet: (14, 14),
    levit: (0, 4),
    upernet: (13, 13),
    rt_detr_v2: (7, 21),
    unet_3d: (0, 6),
    segresnet: (1, 3),
}


@torch.no_grad()
@pytest.mark.world_size(1)
@pytest.mark.filterwarnings("ignore:.*torch.fx cannot trace the whole model")
@pytest.mark.parametrize(("library", "build", "shape"), CASES, ids=[build.__name__ for _, build, _ in CASES])
def test_fused_and_folded_models_equal_the_plain_one(library, build, shape):
    library = pytest.importorskip(library, reason=f"models of {library} need it")
    torch.manual_seed(0)
    plain = build(library).double().eval()
    norms = [m for m in plain.modules() if isinstance(m, _BatchNorm)]
    for m in norms:
        m.running_mean.normal_(0, 0.1)
        m.running_var.uniform_(0.5, 2)
    fused = syncbn.convert_sync_batchnorm(copy.deepcopy(plain), fuse_activation=True)
    folded = syncbn.fold_batchnorm(plain)
    x = torch.randn(2, *shape, dtype=torch.float64)
    for model in (fused, folded):
        assert_close(outputs(model, x), outputs(plain, x), TOLERANCE, "outputs")
    activations = sum(getattr(m, "activation", None) is not None for m in fused.modules() if isinstance(m, syncbn.SyncBatchNorm))
    left = sum(isinstance(m, _BatchNorm) for m in folded.modules())
    least = AT_LEAST.get(build, (0, 0))
    assert activations >= least[0] and len(norms) - left >= least[1]


# ---- Norms of other libraries ---------------------------------------------------------------------------------------------------


def norm_act() -> type[nn.Module]:
    """timm's class, or one with its name and its forward if timm cannot be imported (it needs torchvision)."""
    try:
        from timm.layers.norm_act import BatchNormAct2d

        return BatchNormAct2d
    except (ImportError, RuntimeError):  # RuntimeError: torchvision was made for another build of torch
        pass

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, num_features, act_layer=nn.ReLU):
            super().__init__(num_features)
            self.drop, self.act = nn.Identity(), act_layer()

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    BatchNormAct2d.__module__, BatchNormAct2d.__qualname__ = "timm.layers.norm_act", "BatchNormAct2d"
    return BatchNormAct2d


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_norm_and_activation_of_timm_are_converted_together(world, act):
    """The activation is kept, which torch's converter loses, in training and in eval mode. A reverted layer has timm's class again."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), norm_act()(4, act_layer=act), nn.ReLU()).double()
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain), world.group, fuse_activation=True)
    counts = (2,) * world.size
    whole = torch.randn(sum(counts), 3, 5, 5, dtype=torch.float64)
    for training in (True, False):
        want, got = plain.train(training)(whole), model.train(training)(world.mine(whole, counts))
        assert_close(got, world.mine(want.detach(), counts), 1e-10, "y", want.detach())
    assert isinstance(model[1], syncbn.SyncBatchNorm) and isinstance(model[1], type(plain[1]))
    assert type(syncbn.revert_sync_batchnorm(model)[1]) is type(plain[1])


@pytest.mark.parametrize("convert", [False, True], ids=["plain", "converted"])
def test_norm_and_activation_of_timm_are_folded_together(convert):
    """The activation stays, as a module."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm_act()(4, act_layer=nn.SiLU)).double().eval()
    nn.init.normal_(model[1].running_mean), nn.init.uniform_(model[1].weight)
    if convert:
        syncbn.convert_sync_batchnorm(model)
    folded = syncbn.fold_batchnorm(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_close(folded(x), model(x).detach(), 1e-10, "y")
    assert [type(m) for m in folded[1].activation] == [nn.Identity, nn.SiLU] and not isinstance(folded[1], nn.BatchNorm2d)


def test_frozen_norms_are_kept(world):
    """The frozen norms of detection models are no subclasses of torch's batch norms, and have nothing to synchronize."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, n):
            super().__init__()
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((n,), value))

        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4))
    assert type(syncbn.convert_sync_batchnorm(model, world.group)[1]) is FrozenBatchNorm2d


def test_a_norm_that_is_not_known_is_kept_with_a_warning(world):
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.warns(UserWarning, match="Scaled"):
        assert type(syncbn.convert_sync_batchnorm(Scaled(3), world.group)) is Scaled
