"""Conversion is lossless: all objects stay the same, and its reversal restores each exactly."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncbn
from support.models import Doubling
from support.oracle import assert_close
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

pytestmark = pytest.mark.world_size(1)


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
    """Everything that a module is: class, attributes, tensors by identity, hooks."""
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
    """Some models also keep their layers in a plain list, which must hold the converted ones."""
    model = nn.Sequential(nn.BatchNorm1d(4))
    listed = [model[0]]
    convert_sync_batchnorm(model)
    assert isinstance(listed[0], SyncBatchNorm)


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
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module) and copied.describe() == "mine" and copied.weight is not module.weight
        assert type(revert_sync_batchnorm(copied)) is PlainSubclass


class WithAnAttribute(nn.BatchNorm2d):
    """No forward of its own, but an attribute whose name means something else to SyncBatchNorm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.activation = "relu"


def test_subclass_with_conflicting_attributes_is_left_alone():
    with pytest.warns(UserWarning, match="WithAnAttribute"):
        assert type(convert_sync_batchnorm(WithAnAttribute(4))) is WithAnAttribute


def test_a_model_without_batch_norms_is_left_alone_with_a_warning_that_names_its_norms():
    model = nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    classes = [type(m) for m in model]
    with pytest.warns(UserWarning, match="Sequential contains no batch norm; .* GroupNorm, InstanceNorm2d, LayerNorm"):
        convert_sync_batchnorm(model)
    assert [type(m) for m in model] == classes
    with pytest.warns(UserWarning, match="Linear contains no batch norm; it has no normalization layer"):
        convert_sync_batchnorm(nn.Linear(2, 2))


def test_converting_a_model_once_or_twice_gives_no_warning():
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
        with pytest.warns(UserWarning, match="not reverted.*: norm$"):
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
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.eval()(x), model.eval()(x))
        revert_sync_batchnorm(copied)
        assert [type(m) for m in copied] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]


def test_a_copy_of_a_compiled_layer_does_not_call_the_original():
    layer = convert_sync_batchnorm(nn.BatchNorm1d(4))
    layer.compile(backend="eager")
    for copied in (copy.deepcopy(layer), copy.copy(layer)):
        copied.eval()(torch.randn(5, 4))
        assert layer.training and layer.num_batches_tracked == 0


def test_a_parametrized_layer_can_be_deepcopied_before_and_after_reversal():
    layer = convert_sync_batchnorm(nn.BatchNorm1d(4))
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    for change in (convert_sync_batchnorm, revert_sync_batchnorm, convert_sync_batchnorm):
        copied = copy.deepcopy(change(layer))
        assert type(copied) is type(layer) and torch.equal(copied.weight, layer.weight)


def test_a_bad_group_is_refused_before_anything_changes():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="process_group"):
        convert_sync_batchnorm(model, "world")
    assert type(model[0]) is nn.BatchNorm1d
