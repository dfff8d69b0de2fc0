"""Until it is unfrozen, a frozen batch norm computes what it computes in eval mode, whatever happens to the model around it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import syncbn
from support.collectives import collectives
from syncbn import SyncBatchNorm, SyncBatchNormalization, convert_sync_batchnorm, freeze_bn, revert_sync_batchnorm, unfreeze_bn


class PlainSubclass(nn.BatchNorm2d):
    pass


class OtherForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


LAYERS = {  # of 4 channels
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "a subclass": lambda: PlainSubclass(4),
    "a subclass with a forward": lambda: OtherForward(4),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "torch's SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "lazy": lambda: nn.LazyBatchNorm2d(),
    "SyncBatchNorm": lambda: SyncBatchNorm(4, activation="relu"),
    "converted": lambda: convert_sync_batchnorm(nn.BatchNorm2d(4)),
    "a converted subclass": lambda: convert_sync_batchnorm(PlainSubclass(4)),
    "Keras": lambda: SyncBatchNormalization(1, num_features=4),
    "Keras, not built": lambda: SyncBatchNormalization(1),
}


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_loaded_state(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


EVENTS = {  # what may happen to a model
    "train": lambda model: model.train(),
    "eval, then train": lambda model: model.eval().train(),
    "converted": convert_sync_batchnorm,
    "converted and reverted": lambda model: revert_sync_batchnorm(convert_sync_batchnorm(model)),
    "converted twice": lambda model: convert_sync_batchnorm(convert_sync_batchnorm(model)),
    "deepcopied": copy.deepcopy,
    "copied": copy.copy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved_and_loaded,
    "its state loaded": with_loaded_state,
    "another dtype": lambda model: model.double(),
    "frozen again": freeze_bn,
}


def statistics(layer):
    return [buffer.double().clone() for buffer in layer.buffers()]


def build(name):
    """A model in training mode with one layer, which has seen two batches."""
    model = nn.Sequential(LAYERS[name]())
    for x in torch.randn(2, 5, 4, 3, 3) + 1:
        model(x)
    return model


@pytest.mark.world_size(1)
@pytest.mark.filterwarnings("ignore:not converted", "ignore:not reverted")
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_layer_is_the_layer_in_eval_mode_whatever_happens(name, event):
    model = build(name)
    cls, names = type(model[0]), list(model.state_dict())
    dtype = torch.float64 if event == "another dtype" else torch.float32
    x = torch.randn(5, 4, 3, 3, dtype=dtype)
    want = copy.deepcopy(model).to(dtype).eval()(x)
    assert freeze_bn(model) is model and isinstance(model[0], cls) and list(model.state_dict()) == names
    model = EVENTS[event](model)
    before = statistics(model)
    for mode in (True, False, True):
        assert torch.allclose(model.train(mode)(x), want, atol=1e-6)
        assert model.training == mode and not model[0].training
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    unfreeze_bn(model)
    assert model[0].training and "Frozen" not in type(model[0]).__name__
    model(x)
    assert not all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))


@pytest.mark.world_size(1)
@pytest.mark.parametrize("name", LAYERS)
def test_unfreezing_restores_class_mode_and_parameters(name):
    for training in (True, False):
        layer = LAYERS[name]().train(training)
        attributes = {key: value for key, value in vars(layer).items() if not isinstance(value, dict)}
        cls, trainable = type(layer), [p.requires_grad for p in layer.parameters()]
        unfreeze_bn(freeze_bn(layer, parameters=True))
        assert type(layer) is cls and [p.requires_grad for p in layer.parameters()] == trainable
        assert {key: value for key, value in vars(layer).items() if not isinstance(value, dict)} == attributes


@pytest.mark.world_size(1)
def test_unfreezing_gives_the_mode_that_was_asked_for_last():
    assert not unfreeze_bn(freeze_bn(nn.BatchNorm2d(4)).eval()).training
    assert unfreeze_bn(freeze_bn(nn.BatchNorm2d(4).eval()).train()).training
    traced = convert_sync_batchnorm(freeze_bn(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), fuse_activation=True)
    assert unfreeze_bn(traced)[0].training


@pytest.mark.world_size(1)
@pytest.mark.parametrize("name", LAYERS)
def test_parameters_require_a_gradient_unless_they_are_frozen_too(name):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[name]())
    trainable = [p.requires_grad for p in model[1].parameters()]
    assert [p.requires_grad for p in freeze_bn(model)[1].parameters()] == trainable
    freeze_bn(model, parameters=True)
    assert not any(p.requires_grad for p in model[1].parameters()) and all(p.requires_grad for p in model[0].parameters())
    assert [p.requires_grad for p in unfreeze_bn(model)[1].parameters()] == trainable


@pytest.mark.world_size(1)
def test_a_parameter_that_required_no_gradient_before_requires_none_after():
    layer = nn.BatchNorm2d(4)
    layer.bias.requires_grad_(False)
    unfreeze_bn(freeze_bn(layer, parameters=True))
    assert layer.weight.requires_grad and not layer.bias.requires_grad


@pytest.mark.world_size(1)
def test_a_shallow_copy_has_a_mode_of_its_own():
    layer = freeze_bn(nn.BatchNorm2d(3))
    copy.copy(layer).train(False)
    assert unfreeze_bn(layer).training


@pytest.mark.world_size(1)
def test_a_frozen_plain_layer_can_be_scripted():
    model = freeze_bn(nn.Sequential(nn.BatchNorm2d(3)))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.world_size(1)
def test_a_frozen_lazy_layer_stays_frozen_when_it_is_built():
    for model in (nn.Sequential(nn.LazyBatchNorm2d()), convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))):
        freeze_bn(model, parameters=True)
        assert not model.train()(torch.randn(2, 4, 3, 3)).requires_grad
        assert isinstance(model[0], nn.BatchNorm2d) and model[0].num_batches_tracked == 0 and not model[0].training
        assert type(revert_sync_batchnorm(unfreeze_bn(model))[0]) is nn.BatchNorm2d


@pytest.mark.world_size(1)
def test_a_frozen_keras_layer_ignores_training_true():
    layer = freeze_bn(SyncBatchNormalization(1, num_features=4))
    layer(torch.randn(5, 4) + 1, training=True)
    assert torch.equal(layer.moving_mean, torch.zeros(4))
    unfreeze_bn(layer)(torch.randn(5, 4) + 1, training=True)
    assert not torch.equal(layer.moving_mean, torch.zeros(4))


@pytest.mark.world_size(1)
def test_a_parametrized_layer_freezes_and_stays_parametrized():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", Double())
    for _ in range(2):
        freeze_bn(layer, parameters=True).train()
        assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
        assert not layer.training and torch.equal(layer.weight, torch.full((4,), 2.0)) and not layer.weight.requires_grad
        unfreeze_bn(layer)
        assert layer.training and torch.equal(layer.weight, torch.full((4,), 2.0)) and layer.weight.requires_grad
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(freeze_bn(layer))


@pytest.mark.world_size(1)
def test_conversion_fuses_and_folds_a_frozen_layer():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    plain(torch.randn(5, 3, 4, 4))
    x = torch.randn(5, 3, 4, 4)
    want = copy.deepcopy(plain).eval()(x)
    model = convert_sync_batchnorm(freeze_bn(copy.deepcopy(plain)), fuse_activation=True).train()
    assert model[1].activation == "relu" and torch.allclose(model(x), want, atol=1e-6)
    folded = syncbn.fold_batchnorm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) and torch.allclose(folded(x), want, atol=1e-5)
    assert [type(m) for m in revert_sync_batchnorm(unfreeze_bn(model))] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


@pytest.mark.world_size(1)
def test_frozen_layers_are_leaves_of_fx_graphs_and_compile_in_one_graph():
    model = freeze_bn(nn.Sequential(nn.BatchNorm2d(4), convert_sync_batchnorm(nn.BatchNorm2d(4)))).train()
    x = torch.randn(5, 4, 3, 3)
    assert [node.op for node in torch.fx.symbolic_trace(model).graph.nodes].count("call_module") == 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.world_size(1)
@pytest.mark.parametrize("frozen", ["freeze_bn", "trainable"])
def test_update_bn_stats_leaves_frozen_layers_alone(frozen):
    layer = freeze_bn(nn.BatchNorm1d(4)) if frozen == "freeze_bn" else syncbn.SyncBatchNormalization(num_features=4, trainable=False)
    model = nn.Sequential(layer, nn.BatchNorm1d(4))
    syncbn.update_bn_stats(model, [torch.randn(5, 4)], progress=False)
    assert torch.equal(model[0].running_mean, torch.zeros(4)) and not torch.equal(model[1].running_mean, torch.zeros(4))


@pytest.mark.world_size(2, 3)
@pytest.mark.process_group
def test_frozen_layers_exchange_nothing_and_the_others_stay_in_step(world):
    torch.manual_seed(0)
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))).double()
    freeze_bn(model[1])
    x = torch.randn(5, 4, dtype=torch.float64) * (world.rank + 1)

    def step(layer_count):
        with collectives() as seen:
            model.train()(x).square().sum().backward()
        assert len(seen) == 2 * layer_count
        return [
            all(torch.equal(other, layer.running_mean) for other in world.all_gather(layer.running_mean)) for layer in (model[1], model[3])
        ]

    assert step(1) == [True, True] and torch.equal(model[1].running_mean, torch.zeros(4, dtype=torch.float64))
    freeze_bn(model)
    assert step(0) == [True, True]
    unfreeze_bn(model)
    assert step(2) == [True, True] and not torch.equal(model[1].running_mean, torch.zeros(4, dtype=torch.float64))
