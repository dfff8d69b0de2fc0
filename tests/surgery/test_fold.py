"""A folded model computes the same function with fewer layers. A batch norm is folded only if that is certain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import syncbn
from support.models import ResNet
from support.oracle import assert_close
from syncbn import SyncBatchNorm, SyncBatchNormalization, fold_batchnorm
from syncbn.activation import NAMES
from syncbn.surgery.fold import FoldedBatchNorm

pytestmark = pytest.mark.world_size(1)
# Relative to the greatest output: one rounding of each weight, and sums of up to 256 products in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

LAYERS = {  # (layer with 12 output channels, shape of its input)
    "Linear": (lambda: nn.Linear(5, 12), (7, 5)),
    "Linear without bias": (lambda: nn.Linear(5, 12, bias=False), (7, 5)),
    "Conv1d": (lambda: nn.Conv1d(4, 12, 3), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 12, 3, stride=2, dilation=2, bias=False), (2, 4, 9, 8)),
    "Conv2d, padded by reflection": (lambda: nn.Conv2d(4, 12, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 12, 3, groups=2), (2, 4, 9, 8)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12, bias=False), (2, 12, 5, 6)),
    "Conv2d, channels-last": (lambda: nn.Conv2d(4, 12, 3).to(memory_format=torch.channels_last), (2, 4, 9, 8)),
    "Conv3d": (lambda: nn.Conv3d(2, 12, 2), (2, 2, 3, 4, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 12, 3), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 12, 3, stride=2, output_padding=1, bias=False), (2, 4, 5, 4)),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 12, 3, groups=2), (2, 4, 5, 4)),
    "ConvTranspose2d, depthwise": (lambda: nn.ConvTranspose2d(12, 12, 3, groups=12), (2, 12, 5, 4)),
    "ConvTranspose3d, groups": (lambda: nn.ConvTranspose3d(6, 12, 2, groups=3), (2, 6, 3, 2, 3)),
}
NORMS = {
    "BatchNorm": lambda dim: getattr(nn, f"BatchNorm{max(dim - 2, 1)}d")(12),
    "not affine": lambda dim: getattr(nn, f"BatchNorm{max(dim - 2, 1)}d")(12, affine=False, eps=0.1),
    "torch's SyncBatchNorm": lambda dim: nn.SyncBatchNorm(12),
    "SyncBatchNorm": lambda dim: SyncBatchNorm(12),
    **{f"with {name}": lambda dim, name=name: SyncBatchNorm(12, activation=name, negative_slope=0.3) for name in NAMES},
    "converted": lambda dim: syncbn.convert_sync_batchnorm(getattr(nn, f"BatchNorm{max(dim - 2, 1)}d")(12)),
    "Keras": lambda dim: SyncBatchNormalization(axis=1, num_features=12, activation="silu"),
    "Keras, no scale": lambda dim: SyncBatchNormalization(axis=1 - dim, scale=False, num_features=12),
}


def randomized(model, dtype=torch.float32):
    """Statistics and parameters other than 0 and 1, so that a mistake in any of them shows."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.2, 3)
                for p in (m.weight, m.bias):
                    if p is not None:
                        p.normal_(1)
    return model.to(dtype)


def batch_norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def check(model, *inputs, left=(), tolerance=1e-5):
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    folded = fold_batchnorm(model)
    assert batch_norms(folded) == list(left) and not any(m.training for m in folded.modules())
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    want = copy.deepcopy(model).eval()(*inputs)
    assert_close(folded(*inputs), want.double().detach(), tolerance, "y")
    return folded


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer_and_batch_norm(layer, norm, dtype):
    make, shape = LAYERS[layer]
    model = randomized(nn.Sequential(make(), NORMS[norm](len(shape))), dtype)
    folded = check(model, torch.randn(shape, dtype=dtype), tolerance=TOLERANCE[dtype])
    assert folded[0].weight.stride() == model[0].weight.stride() and folded[0].bias.dtype == dtype


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("convert", [False, True, "fused"])
def test_a_folded_residual_network_computes_the_same(convert, dtype):
    model = randomized(ResNet(), dtype)
    if convert:
        syncbn.convert_sync_batchnorm(model, fuse_activation=convert == "fused")
    folded = check(model, torch.randn(4, 3, 8, 8, dtype=dtype), tolerance=TOLERANCE[dtype])
    assert len(folded.state_dict()) < len(model.state_dict()) and type(folded) is ResNet
    torch.export.export(folded, (torch.randn(4, 3, 8, 8, dtype=dtype),))


class AddingBlock(nn.Module):
    """The residual goes into the batch norm, between its shift and its activation."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), SyncBatchNorm(4, activation="relu")

    def forward(self, x):
        return self.bn(self.conv(x), residual=x)


def test_a_batch_norm_with_a_residual_folds():
    check(randomized(AddingBlock()), torch.randn(2, 4, 5, 5))


def test_linear_on_sequences_with_features_last():
    """The Keras layer normalizes the last dimension of [N, L, C], which is the linear layer's output."""
    check(randomized(nn.Sequential(nn.Linear(3, 6), SyncBatchNormalization(num_features=6))), torch.randn(2, 5, 3))


def test_module_registered_under_two_names_folds():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
            self.conv, self.norm, self.again = self.layers[0], self.layers[1], self.layers[1]

        def forward(self, x):
            return self.again(self.conv(x))

    check(randomized(Model()), torch.randn(2, 2, 4))


def test_folding_leaves_a_layer_that_shares_its_weight_as_it_is():
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1))
    model[2].weight = model[0].weight
    check(randomized(model), torch.randn(2, 3, 4))


def test_16_bit_layer_with_float32_batch_norm():
    model = nn.Sequential(nn.Linear(4, 3), SyncBatchNorm(3))
    randomized(model)[0].to(torch.bfloat16)
    assert fold_batchnorm(model)[0].weight.dtype == torch.bfloat16


# ---- What stays -------------------------------------------------------------------------------------------------------------------


class OwnForward(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


class Tapped(nn.Module):
    """A convolution and a batch norm that must not fold, for the reason that `use` names."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.bn, self.use = nn.Conv1d(3, 3, 1), SyncBatchNorm(3), use

    def forward(self, x):
        y = self.conv(x)
        if self.use == "used again":
            return self.bn(y) + y
        if self.use == "twice the same input":
            return self.bn(y, y)
        if self.use == "layer called twice":
            return self.bn(y) + self.conv(x * 2)
        if self.use == "batch norm called twice":
            return self.bn(self.bn(y))
        if self.use == "statistics used outside":
            return self.bn(y) / (self.bn.running_var[:, None] + 1)
        return self.bn(torch.relu(y))


class TrainingArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), SyncBatchNormalization(num_features=3)

    def forward(self, x):
        return self.bn(self.linear(x), training=True)


def hooked(i, *between):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), *between, nn.BatchNorm1d(3))
    model[i].register_forward_hook(lambda module, args, y: y + 1)
    return model


def replaced(i, *between):
    """One instance has a forward of its own."""
    model = nn.Sequential(nn.Conv1d(3, 3, 1), *between, nn.BatchNorm1d(3))
    model[i].forward = torch.sin
    return model


STAYS = {  # (model, names of the batch norms that stay)
    "batch norm before": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1)), ["0"]),
    "activation between": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU(), nn.BatchNorm1d(3)), ["2"]),
    "the second of two": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.BatchNorm1d(3)), ["2"]),
    "no running statistics": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3, track_running_stats=False)), ["1"]),
    "forward of its own": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), OwnForward(3)), ["1"]),
    "hook on the layer": (lambda: hooked(0), ["1"]),
    "hook on the batch norm": (lambda: hooked(1), ["1"]),
    "forward of the layer replaced": (lambda: replaced(0), ["1"]),
    "forward of the batch norm replaced": (lambda: replaced(1), ["1"]),
    "forward of an identity between replaced": (lambda: replaced(1, nn.Identity()), ["2"]),
    "hook on an identity between": (lambda: hooked(1, nn.Identity()), ["2"]),
    "hook on a container between": (lambda: hooked(1, nn.Sequential(nn.Identity())), ["2"]),
    "features on another axis": (lambda: nn.Sequential(nn.Conv1d(3, 5, 1), SyncBatchNormalization(num_features=5)), ["1"]),
    "weights computed from others": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(3, 3, 1)), nn.BatchNorm1d(3)),
        ["1"],
    ),
    "training=True": (TrainingArgument, ["bn"]),
    "alone": (lambda: nn.BatchNorm1d(3), [""]),
    **{use: (lambda use=use: Tapped(use), ["bn"]) for use in ("used again", "twice the same input", "layer called twice")},
    **{use: (lambda use=use: Tapped(use), ["bn"]) for use in ("batch norm called twice", "statistics used outside")},
    "function between": (lambda: Tapped("function between"), ["bn"]),
}


@pytest.mark.parametrize("name", STAYS)
def test_batch_norm_is_not_folded(name):
    make, left = STAYS[name]
    x = torch.randn(4, 3) if name == "training=True" else torch.randn(4, 3, 5)
    check(randomized(make()), x, left=left)


def test_a_model_that_cannot_be_traced_stays_with_a_warning():
    class Branch(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.warns(UserWarning, match=r"fold_batchnorm: torch.fx cannot trace the whole model.*test_fold.py:\d+ \"return super"):
        check(randomized(Branch(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3))), torch.ones(2, 3, 4), left=["1"])


def test_folded_model_rejects_unsupported_input_rank():
    """In [N, L, C] a linear layer's features are last, and a batch norm's are not. If L == C, the shape does not show the difference."""
    model = randomized(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    folded = check(model, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"2 dimensions for a batch norm that has been folded, got \[2, 3, 3\]"):
        folded(torch.randn(2, 3, 3))
    assert isinstance(folded[1], FoldedBatchNorm)


def test_a_folded_model_traces_with_its_layers_as_nodes():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu"), nn.Flatten()))
    folded = check(model, x := torch.randn(2, 3, 5, 5))
    traced = torch.fx.symbolic_trace(folded)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(traced(x), folded(x))


def test_a_batch_norm_after_identities_folds_into_the_layer_before_them():
    check(randomized(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Identity(), nn.Identity(), nn.BatchNorm1d(4))), torch.randn(2, 3, 5))


class OptionalTap(nn.Module):
    """It returns the convolution's output if it gets an optional argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x, y=None):
        z = self.conv(x)
        return self.bn(z) if y is None else z


class Tied(nn.Module):
    """A weight that is used outside its layer, too."""

    def __init__(self):
        super().__init__()
        self.encode, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return nn.functional.linear(self.bn(self.encode(x)).relu(), self.encode.weight.t())


class TiedUnderAnotherName(Tied):
    """The first name of the weight is that in another layer."""

    def __init__(self):
        nn.Module.__init__(self)
        self.other, self.encode, self.bn = nn.Linear(3, 4), nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.encode.weight = self.other.weight


@pytest.mark.parametrize("make", [OptionalTap, Tied, TiedUnderAnotherName])
def test_not_folded_if_output_or_weight_is_used_elsewhere(make):
    model = make().eval()
    model.bn.running_mean.normal_()
    folded = fold_batchnorm(model)
    x = torch.randn(5, 3, 4) if make is OptionalTap else torch.randn(5, 3)
    assert torch.equal(folded(x), model(x)) and type(folded.bn) is nn.BatchNorm1d
