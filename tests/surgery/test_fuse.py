"""Fusing an activation changes nothing but the number of layers, and reverting the conversion brings the activation back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from support.models import Block, Doubling
from support.oracle import assert_close
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.activation import NAMES, module_of

pytestmark = pytest.mark.world_size(1)


class Tap(nn.Module):
    """The value between batch norm and activation is used twice."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.act(y) + y


class OnlyInTraining(Tap):
    def forward(self, x):
        y = self.bn(x)
        return self.act(y) if self.training else y


class OptionalTap(Tap):
    def forward(self, x, taps=None):
        y = self.bn(x)
        return self.act(y) if taps is not None else y


class Untraceable(Tap):
    def forward(self, x):
        return self.act(self.bn(x)) if x.sum() > 0 else x


class TappedIdentity(Tap):
    """An identity between the two, as in timm's ResNets. Here its output is used twice."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Identity()

    def forward(self, x):
        y = self.drop(self.bn(x))
        return self.act(y) + y


def hooked(i=0, *between):
    model = nn.Sequential(nn.BatchNorm2d(4), *between, nn.ReLU())
    model[i].register_forward_hook(lambda *args: None)
    return model


def hooked_container(register):
    """A hook of a container sees the value between batch norm and activation."""
    layers = [nn.Sequential(nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU())]
    getattr(layers["pre" in register], register)(lambda *args: None)
    return nn.Sequential(*layers)


def replaced(i, *between):
    """One instance has a forward of its own."""
    model = nn.Sequential(nn.BatchNorm2d(4), *between, nn.ReLU())
    model[i].forward = torch.sin
    return model


FUSED = {  # model: number of activations that become part of their batch norm
    **{name: (lambda name=name: nn.Sequential(nn.BatchNorm2d(4), module_of(name, 0.3)), 1) for name in NAMES},
    "in place": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)), 1),
    "a batch norm with a forward of its own": (lambda: nn.Sequential(Doubling(4), nn.ReLU()), 0),
    "two": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.SiLU()), 2),
    "an activation of another kind": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU()), 0),
    "a shared activation": (lambda: Block(4, 4, 1, nn.BatchNorm2d), 0),
    "a feature tap": (Tap, 0),
    "a path that eval does not take": (OnlyInTraining, 0),
    "a hook in between": (hooked, 0),
    "a hook on a container that ends in between": (lambda: hooked_container("register_forward_hook"), 0),
    "a hook on a container that begins in between": (lambda: hooked_container("register_forward_pre_hook"), 0),
    "identities in between": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.Identity(), nn.ReLU()), 1),
    "a hook on an identity in between": (lambda: hooked(1, nn.Identity()), 0),
    "a feature tap on an identity in between": (TappedIdentity, 0),
    "a path for an optional argument": (OptionalTap, 0),
    "a batch norm whose forward is replaced": (lambda: replaced(0), 0),
    "an activation whose forward is replaced": (lambda: replaced(1), 0),
    "an identity in between whose forward is replaced": (lambda: replaced(1, nn.Identity()), 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_fusing_changes_nothing_but_the_number_of_layers(name):
    make, count = FUSED[name]
    plain = make()
    fused = convert_sync_batchnorm(copy.deepcopy(plain), fuse_activation=True)
    assert sum(isinstance(m, SyncBatchNorm) and m.activation is not None for m in fused.modules()) == count
    assert list(fused.state_dict()) == list(plain.state_dict())
    for training in (True, False):
        x = torch.randn(3, 4, 5, 5, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        y, want = fused.train(training)(x), plain.train(training)(other)
        dy = torch.randn_like(y)
        y.backward(dy)
        want.backward(dy)
        assert_close(y, want.double().detach(), 2e-6, "y")
        assert_close(x.grad, other.grad.double(), 1e-5, "dx")  # more roundings, because there may be two layers
    classes = [type(m) for m in plain.modules()]
    assert [type(m) for m in revert_sync_batchnorm(fused).modules()] == classes
    x = torch.randn(3, 4, 5, 5)
    assert_close(fused.eval()(x), plain.eval()(x).double(), 1e-5, "y after the reversal")


def test_what_cannot_be_traced_is_not_fused_and_the_warning_names_the_line():
    with pytest.warns(UserWarning, match=r"fuse_activation: torch.fx cannot trace .*Untraceable, test_fuse.py:\d+ .*x.sum\(\) > 0"):
        model = convert_sync_batchnorm(Untraceable(), fuse_activation=True)
    assert model.bn.activation is None and type(model.act) is nn.ReLU and model.training


class Remembering(Tap):
    """Its forward changes a buffer and an attribute, and makes a tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(4))
        self.last = None

    def forward(self, x):
        self.average.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
        self.last = self.act(self.bn(x)) * torch.tensor(2.0)
        return self.last


def test_tracing_leaves_nothing_in_the_model():
    root, calls = nn.Sequential(model := Remembering()), []
    attributes = set(vars(root))
    model.register_forward_hook(lambda *args: calls.append(args))
    convert_sync_batchnorm(root, fuse_activation=True)
    assert model.bn.activation == "relu"
    assert set(vars(root)) == attributes and model.last is None and torch.equal(model.average, torch.ones(4))
    assert not calls


def test_a_compiled_model_is_not_fused_and_a_warning_says_so():
    with pytest.warns(UserWarning, match="fuse_activation: torch.fx cannot trace .*OptimizedModule: .* this instance replaces it"):
        convert_sync_batchnorm(torch.compile(model := nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), backend="eager"), fuse_activation=True)
    assert model[0].activation is None


def test_reverting_a_part_brings_its_activation_back():
    """Reverting only the batch norm must not lose the ReLU that it absorbed."""
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse_activation=True)
    revert_sync_batchnorm(model[0])
    assert type(model[0]) is nn.BatchNorm2d and type(model[1]) is nn.ReLU


def test_a_fused_activation_stays_a_node_of_fx_graphs_and_is_in_both_reprs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    nodes = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes]
    convert_sync_batchnorm(model, fuse_activation=True)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes] == nodes
    assert "activation='relu'" in repr(model[1]) and repr(model[2]) == "FusedActivation(ReLU)"
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(traced.eval()(x), model.eval()(x))
