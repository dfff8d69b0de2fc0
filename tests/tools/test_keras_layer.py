"""The layer keeps Keras' conventions, in a call and in a model."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.oracle import assert_close
from syncbn import SyncBatchNormalization, ops


@pytest.mark.parametrize(
    "shape, axis", [((4, 3), -1), ((4, 3), 1), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), -2), ((2, 3, 4, 5, 6), 3), ((3, 4), 0)]
)
def test_features_may_be_on_any_axis(world, shape, axis):
    x = torch.randn(shape, dtype=torch.float64)
    layer = SyncBatchNormalization(axis, dtype=torch.float64, process_group=world.group)
    others = [d for d in range(len(shape)) if d != axis % len(shape)]
    mean, var = x.mean(others, keepdim=True), x.var(others, keepdim=True, unbiased=False)  # every rank has the same x
    assert_close(layer(x), (x - mean) / (var + 1e-3).sqrt(), 1e-12, "y")
    assert layer.num_features == shape[axis]


@pytest.mark.world_size(1)
def test_no_copy_for_features_on_the_last_dimension(monkeypatch):
    """The op reads the caller's memory as channels-last, and its output needs no copy either."""
    seen = []
    original = ops.batch_norm
    monkeypatch.setattr(ops, "batch_norm", lambda x, *rest: seen.append(x.data_ptr()) or original(x, *rest))
    x = torch.randn(2, 4, 5, 3)
    y = SyncBatchNormalization()(x)
    assert seen == [x.data_ptr()] and y.is_contiguous()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("training", [True, False, None])
def test_training_argument_overrides_the_mode(world, mode, training):
    layer = SyncBatchNormalization(process_group=world.group).train(mode)
    layer(torch.randn(4, 3) + 5, training=training)
    assert layer.training is mode
    assert (layer.moving_mean.abs().max() > 0) == (mode if training is None else training)


def frozen_at_once(**options):
    return SyncBatchNormalization(trainable=False, **options)


def frozen_later(**options):
    layer = SyncBatchNormalization(**options)
    layer.trainable = False
    return layer


@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("num_features", [None, 3], ids=["lazy", "built"])
@pytest.mark.parametrize("make", [frozen_at_once, frozen_later])
def test_a_frozen_layer_runs_in_inference_mode_and_does_not_train(world, make, num_features, training):
    """As in Keras: trainable=False prevails over training=True. Only rank 0 calls the frozen layer: an exchange would wait for others."""
    layer = make(num_features=num_features, moving_mean_initializer="ones", process_group=world.group)
    x = torch.randn(8, 3, requires_grad=True)
    if world.rank == 0:
        y = layer(x, training=training)
        assert_close(y, ((x - 1) / (1 + layer.epsilon) ** 0.5).double().detach(), 2e-6, "outputs")
        assert torch.equal(layer.moving_mean, torch.ones(3)) and torch.equal(layer.moving_variance, torch.ones(3))
        y.sum().backward()
        assert layer.gamma.grad is None and layer.beta.grad is None and x.grad.abs().sum() > 0
        assert "trainable=False" in repr(layer) and not copy.deepcopy(layer).trainable
    if num_features:
        layer.trainable = True
        layer(x, training=True).square().sum().backward()
        assert layer.gamma.grad is not None and not torch.equal(layer.moving_mean, torch.ones(3))


@pytest.mark.world_size(1)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_center_and_scale_choose_the_parameters(center, scale):
    layer = SyncBatchNormalization(center=center, scale=scale)
    x = torch.randn(6, 3, requires_grad=True)
    layer(x).sum().backward()
    assert [name for name, _ in layer.named_parameters()] == ["gamma"] * scale + ["beta"] * center
    assert (layer.gamma is None, layer.beta is None) == (not scale, not center)
    assert list(layer.state_dict()) == [*dict(layer.named_parameters()), "moving_mean", "moving_variance"]


@pytest.mark.world_size(1)
@pytest.mark.parametrize("num_features", [3, None], ids=["at once", "at the first call"])
def test_initializers_by_name_or_callable(num_features):
    layer = SyncBatchNormalization(
        beta_initializer="ones",
        gamma_initializer=lambda shape, dtype: np.full(shape, 0.5),
        moving_mean_initializer=torch.ones,
        moving_variance_initializer="zeros",
        num_features=num_features,
    )
    layer(torch.zeros(2, 3), training=False)
    values = [t.tolist() for t in (layer.beta, layer.gamma, layer.moving_mean, layer.moving_variance)]
    assert values == [[1] * 3, [0.5] * 3, [1] * 3, [0] * 3]
    with torch.no_grad():
        layer.gamma.zero_()
    layer.reset_parameters()
    assert layer.gamma.tolist() == [0.5] * 3


BAD_ARGUMENTS = {
    "fused=True": ({"fused": True}, ValueError, r"SyncBatchNormalization does not support fused=True\."),
    "fused=None": ({"fused": None}, ValueError, r"SyncBatchNormalization does not support fused=True\."),
    "initializer": ({"beta_initializer": "glorot"}, ValueError, "beta_initializer must be one of .*'zeros'.* got 'glorot'"),
    "weighting": ({"weighting": "votes"}, ValueError, "weighting must be one of"),
    "two axes": ({"axis": [1, 2]}, TypeError, r"axis must be one dimension, an integer, got \[1, 2\]"),
    "renorm": ({"renorm": True}, TypeError, "renorm"),
}


@pytest.mark.world_size(1)
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name):
    options, error, message = BAD_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        SyncBatchNormalization(**options)


@pytest.mark.world_size(1)
def test_defaults_are_horovods():
    layer = SyncBatchNormalization(fused=False)
    values = (layer.axis, layer.momentum, layer.epsilon, layer.center, layer.scale, layer.weighting, layer.unbiased)
    assert values == (-1, 0.99, 1e-3, True, True, "ranks", False)


@pytest.mark.world_size(1)
def test_bad_input_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"axis 4 among them, got \[2, 3, 4, 5\]"):
        SyncBatchNormalization(axis=4)(torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"^SyncBatchNormalization\(\): inputs must have 2 or more dimensions"):
        SyncBatchNormalization()(torch.randn(3))
    with pytest.raises(ValueError, match=r"^SyncBatchNormalization\(3\): inputs must have 3 features on axis -1, got \[2, 4\]"):
        SyncBatchNormalization(num_features=3)(torch.randn(2, 4))
    layer = SyncBatchNormalization(num_features=3)
    layer.momentum = None  # as torch.optim.swa_utils.update_bn sets it
    with pytest.raises(ValueError, match=r"^SyncBatchNormalization\(3\): momentum must be a number"):
        layer(torch.randn(2, 3))


def test_fused_activation_equals_one_after_the_layer(world):
    x = torch.randn(4, 3)
    plain = SyncBatchNormalization(process_group=world.group)
    fused = SyncBatchNormalization(process_group=world.group, activation="leaky_relu", negative_slope=0.3)
    assert_close(fused(x), nn.functional.leaky_relu(plain(x), 0.3).double().detach(), 2e-6, "y")


# ---- Living in a model ------------------------------------------------------------------------------------------------------------


@pytest.mark.world_size(1)
def test_state_dict_builds_a_layer():
    layer = SyncBatchNormalization(momentum=0.5)
    layer(torch.randn(5, 3))
    for state in (layer.state_dict(), dict(layer.state_dict())):  # with and without torch's metadata
        for other in (SyncBatchNormalization(), SyncBatchNormalization(num_features=3)):
            other.load_state_dict(state)
            assert other.num_features == 3 and not other._forward_pre_hooks
            x = torch.randn(2, 3)
            assert torch.equal(other.eval()(x), layer.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch for gamma"):
        SyncBatchNormalization(num_features=4).load_state_dict(layer.state_dict())


@pytest.mark.world_size(1)
def test_building_keeps_the_values_of_a_partial_state_dict():
    layer = SyncBatchNormalization()
    layer.load_state_dict({"gamma": torch.tensor([2.0, 3.0])}, strict=False)
    layer(torch.randn(4, 2))
    assert layer.gamma.tolist() == [2, 3] and layer.beta.tolist() == [0, 0]


@pytest.mark.parametrize("build", [True, False], ids=["built", "not built"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_no_tensor(world, build, duplicate):
    if world.group is not None and duplicate is not copy.deepcopy:
        pytest.skip("a communicator cannot be pickled")
    layer = SyncBatchNormalization(process_group=world.group)
    x = torch.randn(4, 3)
    if build:
        layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.moving_mean, layer.moving_mean)
    assert other.gamma is not layer.gamma and other.moving_mean is not layer.moving_mean


@pytest.mark.process_group
@pytest.mark.world_size(2, 3)
def test_gradients_under_ddp_are_those_of_the_whole_batch(world):
    with pytest.raises(RuntimeError, match="uninitialized parameters"):
        DistributedDataParallel(nn.Sequential(SyncBatchNormalization()))
    model = nn.Sequential(nn.Linear(4, 3), SyncBatchNormalization(num_features=3, momentum=0.9)).double()
    plain = copy.deepcopy(model)
    whole = torch.randn(2 * world.size, 4, dtype=torch.float64)
    parallel = DistributedDataParallel(model)  # kept in a variable, because its hooks must outlive the forward pass
    parallel(whole[2 * world.rank :][:2]).square().mean().backward()
    plain[1].process_group = syncbn.new_group(1)
    plain(whole).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        # Relative to the weight's gradient, because the gradient of a bias before a batch norm is 0.
        assert_close(ours.grad, theirs.grad, 1e-10, name, plain[0].weight.grad)


@pytest.mark.world_size(1)
def test_torchs_tools_treat_it_as_a_batch_norm():
    """torch's tools take it for a batch norm. This package's leave it as it is: it is synchronized, and torch has no class like it."""
    model = nn.Sequential(SyncBatchNormalization(num_features=3, name="bn"))
    assert isinstance(model[0], nn.modules.batchnorm._BatchNorm) and model[0].layer_name == "bn"
    state = vars(model[0]).copy()
    syncbn.convert_sync_batchnorm(model)
    with pytest.warns(UserWarning, match="not reverted"):
        syncbn.revert_sync_batchnorm(model)
    assert type(model[0]) is SyncBatchNormalization and vars(model[0]) == state


@pytest.mark.world_size(1)
@pytest.mark.parametrize("num_features", [3, None], ids=["built", "not built"])
def test_compiles_in_one_graph(num_features):
    layer = SyncBatchNormalization(num_features=num_features)
    other = copy.deepcopy(layer)
    x = torch.randn(2, 4, 3)
    for mode in (True, False):
        assert_close(torch.compile(layer.train(mode), fullgraph=True, backend="eager")(x), other.train(mode)(x).double().detach(), 0, "y")
