"""torch's tools do with this package's layers what they do with torch's batch norms."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

import syncbn
from support.models import two_norms
from support.oracle import assert_close

FLOAT = 2e-6  # float32: a few roundings


def net() -> nn.Sequential:
    return two_norms(2, (3, 4, 2), nn.LeakyReLU(), kernel=3)


@pytest.fixture
def model(world):
    return syncbn.convert_sync_batchnorm(net(), world.group, fuse_activation=True)


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8)


def test_deepcopy_is_independent_and_keeps_the_group(world, model, x):
    other = copy.deepcopy(model)
    assert other[1].process_group is model[1].process_group
    other(x)
    assert model[1].num_batches_tracked == 0 and other[1].num_batches_tracked == 1
    assert torch.equal(other.eval()(x), copy.deepcopy(other)(x))


def test_a_saved_model_computes_the_same(x):
    """A model without an explicit process group can be pickled as a whole."""
    model = syncbn.convert_sync_batchnorm(net(), fuse_activation=True)
    model(x)
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x)) and type(other[1]) is syncbn.SyncBatchNorm2d and other[1].activation == "relu"
        assert type(syncbn.revert_sync_batchnorm(other)[1]) is nn.BatchNorm2d


def test_state_dicts_are_weights_only(model, x):
    model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    plain = net()
    plain.load_state_dict(state)
    assert_close(plain.eval()(x), model.eval()(x).double().detach(), FLOAT, "y")


@pytest.mark.process_group
def test_a_distributed_checkpoint_loads_into_the_plain_model(world, model, x, tmp_path_factory):
    name = [str(tmp_path_factory.mktemp("checkpoint")) if world.rank == 0 else None]
    torch.distributed.broadcast_object_list(name)
    model(x)
    dcp.save(model.state_dict(), checkpoint_id=name[0])
    plain = net()
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=name[0])
    plain.load_state_dict(state)
    for got, want in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(got, want)


def test_averaged_model_and_update_bn(world, x):
    """First the weights are averaged, then the loader gives the averaged model its statistics: those of the whole batches."""
    plain, model = net(), syncbn.convert_sync_batchnorm(net(), world.group)
    averages = [AveragedModel(m) for m in (plain, model)]
    for average, m in zip(averages, (plain, model), strict=True):
        with torch.no_grad():
            m[0].weight.mul_(1.5)
        average.update_parameters(m)
    batches = torch.randn(3, 2 * world.size, 3, 8, 8)
    update_bn(batches, averages[0])
    update_bn([world.mine(batch, (2,) * world.size) for batch in batches], averages[1])
    for (name, want), got in zip(averages[0].named_buffers(), averages[1].buffers(), strict=True):
        assert_close(got, want.double(), FLOAT, name)


def test_an_averaged_model_averages_buffers(model, x):
    average = AveragedModel(model, use_buffers=True)
    model(x)
    average.update_parameters(model)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_an_exported_eval_model_needs_no_syncbn(world, x, residual):
    """The program has only torch's own operators."""
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, activation="silu").eval()
    inputs = (x, x.sin()) if residual else (x,)
    program = torch.export.export(layer, inputs, dynamic_shapes=({0: torch.export.Dim("batch")},) * len(inputs) if not residual else None)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and all(name.startswith("aten.") for name in names)
    assert_close(program.module()(*inputs), layer(*inputs).double().detach(), FLOAT, "y")


@pytest.mark.world_size(1)
@pytest.mark.parametrize("layer", [syncbn.SyncBatchNorm(4), syncbn.SyncBatchNormalization(axis=1, num_features=4)], ids=["torch", "keras"])
def test_a_layer_is_one_call_in_a_traced_graph(layer):
    """Feature extractors and other tools of torch.fx expect this, as of torch's own layers."""
    plain = nn.Sequential(nn.Linear(3, 4), layer, nn.ReLU())
    traced = torch.fx.symbolic_trace(plain)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(5, 3)
    assert torch.equal(traced(x), plain(x))


@pytest.mark.world_size(1)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a_traced_training_layer_trains_as_the_layer_does(residual):
    """A tool that counts operations, for example, traces a model in training mode."""
    x = torch.randn(5, 4, requires_grad=True)
    inputs = (x, torch.randn(5, 4)) if residual else (x,)
    layer = syncbn.SyncBatchNorm(4, activation="relu")
    other = copy.deepcopy(layer)
    traced = torch.jit.trace(layer, inputs, check_trace=False)
    layer.load_state_dict(other.state_dict())
    for _ in range(2):
        got, want = (torch.autograd.grad(m(*inputs).square().sum(), (x, m.weight)) for m in (traced, other))
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


@pytest.mark.world_size(1)
def test_a_traced_eval_model_equals_the_model(model, x):
    """torch.jit.trace checks by itself that a second trace, without gradients, gives the same graph."""
    traced = torch.jit.trace(model.eval(), (x,))
    assert torch.equal(traced(x), model(x))


@pytest.mark.world_size(1)
def test_onnx_export_of_a_reverted_model(model, x):
    onnx = pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript")
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    model(x)
    program = torch.onnx.export(syncbn.revert_sync_batchnorm(model).eval(), (x,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    domains = {node.domain for node in program.model_proto.graph.node}
    assert domains <= {"", "ai.onnx"}


def test_a_model_without_memory_converts_and_trains(world, x):
    """On the meta device a model has no memory: `to_empty` allocates it."""
    with torch.device("meta"):
        model = net()
    model = syncbn.convert_sync_batchnorm(model, world.group)
    model = model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    assert torch.equal(model(x), syncbn.convert_sync_batchnorm(net(), world.group)(x))
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(x).isfinite().all()


def test_lazy_layers_convert_before_their_features_are_known(world, x):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    model = syncbn.convert_sync_batchnorm(model, world.group)
    model(x)
    assert type(model[1]) is syncbn.SyncBatchNorm2d and model[1].num_features == 4 and model[1].num_batches_tracked == 1
    assert type(syncbn.revert_sync_batchnorm(model)[1]) is nn.BatchNorm2d


class Positive(nn.Module):
    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.log()


@pytest.mark.parametrize("when", ["before conversion", "after conversion"])
def test_a_parametrized_weight_gets_its_gradient(world, x, when):
    """The weight is a function of another parameter, which gets the gradient. Conversion and parametrization can be undone in any order."""
    layer = nn.BatchNorm2d(3)
    if when.startswith("before"):
        parametrize.register_parametrization(layer, "weight", Positive())
    layer = syncbn.convert_sync_batchnorm(layer, world.group)
    if when.startswith("after"):
        parametrize.register_parametrization(layer, "weight", Positive())
    assert isinstance(layer, syncbn.SyncBatchNorm) and torch.equal(layer.weight, torch.ones(3))
    layer(x).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().sum() > 0
    copy.deepcopy(layer)(x)
    reverted = syncbn.revert_sync_batchnorm(copy.deepcopy(layer))
    assert isinstance(reverted, nn.BatchNorm2d) and torch.equal(reverted.weight, layer.weight)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is syncbn.SyncBatchNorm2d and layer(x).isfinite().all()
    assert type(syncbn.revert_sync_batchnorm(layer)) is nn.BatchNorm2d


def test_weight_norm_of_the_layer_before(world, x):
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    model = syncbn.convert_sync_batchnorm(model, world.group)
    model(x).square().sum().backward()
    assert model[1].weight.grad is not None


def test_functional_call_takes_parameters_from_outside(world, model, x):
    """As meta-learning does."""
    state = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in model.state_dict().items()}
    state = {name: t.detach() if "running" in name else t for name, t in state.items()}
    y = torch.func.functional_call(model, state, (x,))
    y.square().sum().backward()
    assert state["1.weight"].grad is not None and model[1].weight.grad is None
    assert state["1.num_batches_tracked"] == 1 and model[1].num_batches_tracked == 0
