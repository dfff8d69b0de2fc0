"""Conversion is lossless: the same objects, and exactly what was there, when it is undone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncbn
from support.oracle import assert_close
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

pytestmark = pytest.mark.world_size(1)


class Doubling(SyncBatchNorm):
    def forward(self, input, residual=None):
        return 2 * super().forward(input, residual) - 1


class PlainSubclass(nn.BatchNorm2d):
    """No forward of its own: nothing is lost."""

    def describe(self):
        return "mine"


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


BATCH_NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 6)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 3, 2)),
    "torch's SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), (3, 4, 5)),
    "PlainSubclass": (lambda: PlainSubclass(4), (3, 4, 5, 6)),
    "float64": (lambda: nn.BatchNorm2d(4, dtype=torch.float64), (3, 4, 5, 6)),
    "not affine": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 5, 6)),
    "not tracking": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 5, 6)),
    "momentum None, eps 0.1": (lambda: nn.BatchNorm2d(4, momentum=None, eps=0.1), (3, 4, 5, 6)),
}


def fingerprint(module):
    """Everything that a module is: class, attributes by identity, hooks, tensors."""
    public = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
    tensors = {**module._parameters, **module._buffers}
    hooks = {key: dict(value) for key, value in vars(module).items() if "hooks" in key}
    return type(module), public, {key: id(t) for key, t in tensors.items()}, hooks


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_round_trip_restores_everything(name):
    module = BATCH_NORMS[name][0]().eval()
    module.qconfig = "an extra attribute"
    calls = []
    handle = module.register_forward_hook(lambda *args: calls.append(1))
    for p in module.parameters():
        p.requires_grad_(False)
    before = fingerprint(module)
    convert_sync_batchnorm(module)
    assert isinstance(module, SyncBatchNorm) and not module.training and module.qconfig == "an extra attribute"
    assert fingerprint(module)[2:] == before[2:]
    revert_sync_batchnorm(module)
    assert fingerprint(module) == before
    handle.remove()
    assert not module._forward_hooks


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_converted_computes_the_same(name):
    make, shape = BATCH_NORMS[name]
    plain = make()
    ours = convert_sync_batchnorm(copy.deepcopy(plain))
    dtype = torch.float64 if name == "float64" else torch.float32
    for training in (True, False):
        x = torch.randn(shape, dtype=dtype) + 1
        assert_close(ours.train(training)(x), plain.train(training)(x).double().detach(), 2e-6, "y")
    for ours_buffer, buffer in zip(ours.buffers(), plain.buffers(), strict=True):
        assert_close(ours_buffer.double(), buffer.double(), 2e-6, "buffer")


def test_the_optimizer_and_the_state_dict_stay_valid():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys = list(model.state_dict())
    convert_sync_batchnorm(model)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    before = model[1].weight.clone()
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_a_module_shared_in_two_places_stays_shared():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    convert_sync_batchnorm(model)
    assert model["a"][0] is model["b"][0] is shared and isinstance(shared, SyncBatchNorm)
    revert_sync_batchnorm(model)
    assert type(shared) is nn.BatchNorm1d


def test_a_batch_norm_kept_outside_the_module_tree_is_converted_too():
    """Some models hold their layers in a plain list besides: the object is the same one."""
    model = nn.Sequential(nn.BatchNorm1d(4))
    beside = [model[0]]
    convert_sync_batchnorm(model)
    assert isinstance(beside[0], SyncBatchNorm)


def test_lazy_batch_norm_before_and_after_its_first_input():
    for use_first in (False, True):
        model = nn.Sequential(nn.LazyBatchNorm2d(momentum=0.3))
        convert_sync_batchnorm(model)
        if use_first:
            model(torch.randn(2, 5, 3, 3))
            assert type(model[0]) is syncbn.SyncBatchNorm2d and model[0].num_features == 5 and model[0].momentum == 0.3
            assert model[0].weight.shape == (5,)
        revert_sync_batchnorm(model)
        assert type(model[0]) is (nn.BatchNorm2d if use_first else nn.LazyBatchNorm2d)
        y = model(torch.randn(2, 5, 3, 3))
        assert type(model[0]) is nn.BatchNorm2d and y.shape == (2, 5, 3, 3)


def test_a_subclass_with_its_own_forward_is_left_alone_with_one_warning():
    model = nn.Sequential(WithActivation(4), WithActivation(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="WithActivation") as caught:
        convert_sync_batchnorm(model)
    assert len(caught) == 1
    assert type(model[0]) is WithActivation and isinstance(model[2], SyncBatchNorm)
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    with pytest.warns(UserWarning, match="BatchNorm2d"):
        assert type(convert_sync_batchnorm(patched)) is nn.BatchNorm2d


def test_a_scripted_batch_norm_is_left_alone_with_a_warning():
    with pytest.warns(UserWarning, match="BatchNorm2d"):
        convert_sync_batchnorm(nn.Sequential(torch.jit.script(nn.BatchNorm2d(4))))


def test_a_plain_subclass_keeps_its_methods():
    module = convert_sync_batchnorm(PlainSubclass(4))
    assert isinstance(module, SyncBatchNorm) and isinstance(module, PlainSubclass) and module.describe() == "mine"
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and twin.describe() == "mine" and twin.weight is not module.weight
        assert type(revert_sync_batchnorm(twin)) is PlainSubclass


class WithAnAttribute(nn.BatchNorm2d):
    """No forward of its own, but a word that means something else to SyncBatchNorm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.activation = "relu"


def test_subclass_with_conflicting_attributes_is_left_alone():
    with pytest.warns(UserWarning, match="WithAnAttribute"):
        assert type(convert_sync_batchnorm(WithAnAttribute(4))) is WithAnAttribute


BUILT = {  # layers that have no name until they are converted
    "SyncBatchNorm": lambda: SyncBatchNorm(4),
    "SyncBatchNorm2d": lambda: syncbn.SyncBatchNorm2d(4),
    "Keras": lambda: syncbn.SyncBatchNormalization(num_features=4),
    "converted alone": lambda: convert_sync_batchnorm(nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, SyncBatchNorm.convert_sync_batchnorm], ids=["function", "classmethod"])
@pytest.mark.parametrize("name", BUILT)
def test_layers_that_were_built_get_names(name, convert):
    assert convert(nn.ModuleDict({"stem": BUILT[name]()}))["stem"].layer_name == "stem"


def test_names_survive_copies_pickles_and_lazy_building():
    model = convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d(), SyncBatchNorm(4)))
    model(torch.randn(2, 4, 3, 3))
    for copied in (model, copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert [m.layer_name for m in copied] == ["0", "1"]


def test_the_whole_model_renames_what_a_part_has_named_and_not_what_the_user_has():
    """Two parts that are converted one by one both have a layer "0"; on the wire they must not be the same."""
    parts = nn.ModuleDict({"left": nn.Sequential(nn.BatchNorm1d(4)), "right": nn.Sequential(nn.BatchNorm1d(4), SyncBatchNorm(4))})
    for part in parts.values():
        convert_sync_batchnorm(part)
    parts["right"][1].layer_name = "by hand"
    convert_sync_batchnorm(parts)
    names = [m.layer_name for m in parts.modules() if isinstance(m, SyncBatchNorm)]
    assert names == ["left.0", "right.0", "by hand"]
    convert_sync_batchnorm(parts["left"])
    assert parts["left"][0].layer_name == "left.0"


def test_a_model_without_batch_norms_is_left_alone_with_a_warning_that_names_its_norms():
    model = nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    classes = [type(m) for m in model]
    with pytest.warns(UserWarning, match="Sequential contains no batch norm; .* GroupNorm, InstanceNorm2d, LayerNorm"):
        convert_sync_batchnorm(model)
    assert [type(m) for m in model] == classes
    with pytest.warns(UserWarning, match="Linear contains no batch norm; it has no normalization layer"):
        convert_sync_batchnorm(nn.Linear(2, 2))


def test_a_model_that_converts_or_is_converted_already_does_so_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4)))
        convert_sync_batchnorm(model)
    assert type(model[1]) is nn.LayerNorm


def test_a_built_layer_reverts_to_plain_batch_norm_or_is_named():
    plain = revert_sync_batchnorm(SyncBatchNorm(4))
    assert not isinstance(plain, SyncBatchNorm)
    for shape in ((3, 4), (3, 4, 5), (3, 4, 5, 6)):
        x = torch.randn(shape)
        assert torch.equal(plain(x), F.batch_norm(x, None, None, plain.weight, plain.bias, True))
    for options in ({"activation": "relu"}, {"unbiased": False}, {"weighting": "ranks"}):
        model = nn.ModuleDict({"norm": SyncBatchNorm(4, **options)})
        with pytest.warns(UserWarning, match="norm"):
            assert isinstance(revert_sync_batchnorm(model)["norm"], SyncBatchNorm)


def test_a_users_subclass_of_ours_is_not_reverted_but_named():
    for fuse in (False, True):
        model = convert_sync_batchnorm(nn.Sequential(Doubling(4), nn.ReLU()), fuse_activation=fuse)
        with pytest.warns(UserWarning, match="not reverted.*: 0"):
            assert [type(m) for m in revert_sync_batchnorm(model)] == [Doubling, nn.ReLU]


def test_the_classmethod_is_the_function():
    model = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), fuse_activation=True)
    assert isinstance(model[0], SyncBatchNorm) and model[0].activation == "relu"


def test_pickle_and_deepcopy_of_a_converted_model():
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), fuse_activation=True)
    x = torch.randn(5, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(x), model.eval()(x))
        revert_sync_batchnorm(twin)
        assert [type(m) for m in twin] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]


def test_a_bad_group_is_refused_before_anything_changes():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="process_group"):
        convert_sync_batchnorm(model, "world")
    assert type(model[0]) is nn.BatchNorm1d


# ---- Fused activations ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU called twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


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
    """As timm's ResNets have it, an identity in between, whose output is used twice here."""

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


FUSED = {  # model: number of activations that become part of their batch norm
    "relu": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)), 1),
    "silu": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()), 1),
    "leaky_relu": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.3)), 1),
    "a batch norm with a forward of its own": (lambda: nn.Sequential(Doubling(4), nn.ReLU()), 0),
    "two": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.SiLU()), 2),
    "an activation of another kind": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU()), 0),
    "a shared activation": (Block, 0),
    "a feature tap": (Tap, 0),
    "a path that eval does not take": (OnlyInTraining, 0),
    "a hook in between": (hooked, 0),
    "identities in between": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.Identity(), nn.ReLU()), 1),
    "a hook on an identity in between": (lambda: hooked(1, nn.Identity()), 0),
    "a feature tap on an identity in between": (TappedIdentity, 0),
    "a path for an optional argument": (OptionalTap, 0),
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
        assert_close(x.grad, other.grad.double(), 1e-5, "dx")  # through two layers where there are two
    classes = [type(m) for m in plain.modules()]
    assert [type(m) for m in revert_sync_batchnorm(fused).modules()] == classes
    x = torch.randn(3, 4, 5, 5)
    assert_close(fused.eval()(x), plain.eval()(x).double(), 1e-5, "y after the reversal")


def test_what_cannot_be_traced_is_not_fused_and_the_warning_names_the_line():
    with pytest.warns(UserWarning, match=r"fuse_activation: torch.fx cannot trace .*Untraceable, test_convert.py:\d+ .*x.sum\(\) > 0"):
        model = convert_sync_batchnorm(Untraceable(), fuse_activation=True)
    assert model.bn.activation is None and type(model.act) is nn.ReLU and model.training


def test_reverting_a_part_brings_its_activation_back():
    """Reverting the batch norm alone must not lose the ReLU that it took over."""
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


def test_layer_names_are_dotted_paths():
    model = syncbn.convert_sync_batchnorm(nn.ModuleDict({"stem": nn.Sequential(nn.BatchNorm2d(4))}))
    assert model["stem"][0].layer_name == "stem.0"
