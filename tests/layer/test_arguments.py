"""What callers give the layer: views, subclasses, freed memory, passes in any order. It computes with them or refuses them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncbn
from support.oracle import assert_close
from syncbn import ops, reference


@pytest.fixture(params=[ops, reference], ids=["kernels", "reference"])
def implementation(request, monkeypatch):
    for name in ops.SCHEMAS:
        monkeypatch.setattr(ops, name, getattr(request.param, name))
    if request.param is reference:
        monkeypatch.setattr(ops, "refuse_wrong_tensors", lambda x: False)


# ---- Passes in any order ----------------------------------------------------------------------------------------------------


def small_net(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 1), make(), nn.Conv2d(6, 2, 1)).double()


def converted():
    return syncbn.SyncBatchNorm(6, momentum=0.5)


def frozen_parameters():
    return converted().requires_grad_(False)


class ChannelsSecond(syncbn.SyncBatchNormalization):
    def __init__(self):
        super().__init__(axis=1, momentum=0.5, num_features=6)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("make", [converted, frozen_parameters, ChannelsSecond])
def test_the_gradient_of_an_eval_pass_is_by_the_statistics_it_used(implementation, make):
    """Here a training pass moves the statistics before the backward pass. torch's layer raises an error then."""
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    apart, together = small_net(make), small_net(make)
    apart.eval()(x).square().sum().backward()
    apart.train()(x).sin().sum().backward()
    y = together.eval()(x)
    z = together.train()(x)
    (y.square().sum() + z.sin().sum()).backward()
    for name, p in apart.named_parameters():
        if p.requires_grad:
            assert_close(together.get_parameter(name).grad, p.grad, 1e-12, name)


@pytest.mark.world_size(1)
def test_who_has_saved_a_moving_statistic_is_told_that_it_has_changed(implementation):
    layer, scale = syncbn.SyncBatchNorm(3), torch.ones(3, requires_grad=True)
    for buffer in (layer.running_mean, layer.running_var):
        product = (buffer * scale).sum()
        layer(torch.randn(4, 3))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():  # whose tensors have no version
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3))


# ---- Subclasses -------------------------------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass of Tensor, as MONAI's MetaTensor is one."""


@contextmanager
def nested_modes():
    with torch.device("cpu"), torch.device("cpu"):
        yield


@pytest.mark.world_size(1)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [nullcontext, lambda: torch.device("cpu"), nested_modes], ids=["no mode", "default device", "two modes"])
def test_a_subclass_of_tensor_comes_out_as_it_went_in(implementation, training, mode):
    x = torch.randn(4, 3, 5)
    plain, tagged = (syncbn.SyncBatchNorm(3).train(training) for _ in range(2))
    leaf = x.clone().requires_grad_()
    other = x.clone().as_subclass(Tagged).requires_grad_()
    with mode():
        want, got = F.relu(plain(leaf), inplace=True), F.relu(tagged(other), inplace=True)
    assert type(got) is Tagged and type(want) is torch.Tensor
    assert torch.equal(got.as_subclass(torch.Tensor), want)
    want.square().sum().backward()
    got.square().sum().backward()
    assert torch.equal(torch.Tensor(other.grad), leaf.grad) and torch.equal(tagged.weight.grad, plain.weight.grad)
    assert torch.equal(tagged.running_var, plain.running_var) and type(tagged.running_var) is torch.Tensor


@pytest.mark.world_size(1)
def test_a_subclass_among_the_other_arguments_is_taken():
    x = torch.randn(4, 3, 5)
    weight, residual = torch.rand(3).as_subclass(Tagged).requires_grad_(), torch.randn_like(x).as_subclass(Tagged)
    y = syncbn.sync_batch_norm(x, None, None, weight, residual=residual, activation="relu")
    assert torch.allclose(y, F.relu(F.batch_norm(x, None, None, torch.Tensor(weight), training=True) + residual), atol=1e-5)
    y.sum().backward()
    assert weight.grad.shape == (3,)


@pytest.mark.world_size(1)
def test_monais_tensors_keep_what_they_know():
    monai = pytest.importorskip("monai.data", reason="needs monai")
    x = monai.MetaTensor(torch.randn(2, 3, 4, 4), meta={"path": "scan"})
    y = nn.Sequential(syncbn.SyncBatchNorm(3), nn.ReLU(inplace=True))(x)
    assert isinstance(y, monai.MetaTensor) and y.meta["path"] == "scan"


# ---- Views ------------------------------------------------------------------------------------------------------------------


@pytest.mark.world_size(1)
def test_parameters_and_statistics_may_be_columns_of_a_matrix(implementation):
    x, columns = torch.randn(6, 4, 3), torch.rand(4, 2, requires_grad=True)
    state, torchs = torch.ones(4, 3), torch.ones(4, 3)
    y = syncbn.sync_batch_norm(x, state[:, 0], state[:, 2], columns[:, 0], columns[:, 1])
    want = F.batch_norm(x, torchs[:, 0], torchs[:, 2], columns[:, 0], columns[:, 1], training=True)
    (got_grad,), (want_grad,) = (torch.autograd.grad(t.square().sum(), columns) for t in (y, want))
    assert torch.allclose(y, want, atol=1e-5) and torch.allclose(got_grad, want_grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(state, torchs, atol=1e-6) and (state[:, 1] == 1).all()


@pytest.mark.world_size(1)
def test_one_weight_for_all_channels_has_the_sum_of_their_gradients(implementation):
    x, one = torch.randn(6, 4, 3), torch.ones(1, requires_grad=True)
    dy = torch.randn_like(x)
    got, want = (
        torch.autograd.grad((y * dy).sum(), one)[0]
        for y in (syncbn.sync_batch_norm(x, None, None, one.expand(4)), F.batch_norm(x, None, None, one.expand(4), training=True))
    )
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


# ---- What is refused is refused before any exchange -------------------------------------------------------------------------


def freed(*shape):
    t = torch.ones(shape)
    t.untyped_storage().resize_(0)
    return t


X = torch.ones(4, 3, 5)
REFUSED = {
    "freed input": (lambda: (freed(4, 3, 5), None, None), {}, r"input \[4, 3, 5\] has no memory: its storage has been freed"),
    "freed weight": (lambda: (X, None, None, freed(3)), {}, r"weight \[3\] has no memory"),
    "freed bias": (lambda: (X, None, None, None, freed(3)), {}, r"bias \[3\] has no memory"),
    "freed statistics": (lambda: (X, freed(3), torch.ones(3)), {}, r"running_mean \[3\] has no memory"),
    "expanded statistics": (lambda: (X, torch.zeros(1).expand(3), torch.ones(3)), {}, "running_mean .* got an expanded tensor"),
    "eps 0": (lambda: (X, None, None), {"eps": 0.0}, "eps must be positive in training, got 0.0"),
    "eps -1": (lambda: (X, None, None), {"eps": -1.0}, "eps must not be negative, got -1.0"),
    "eps nan": (lambda: (X, None, None), {"eps": float("nan")}, "eps must not be negative, got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_argument_is_refused_before_any_exchange(world, implementation, case):
    """Only rank 0 has the bad argument. If it had begun an exchange, the ranks would be out of step in the next one."""
    make, options, message = REFUSED[case]
    if world.rank == 0:
        with pytest.raises(ValueError, match=message):
            syncbn.sync_batch_norm(*make(), process_group=world.group, **options)
    y = syncbn.sync_batch_norm(X * (world.rank + 1), None, None, process_group=world.group)
    assert y.isfinite().all()


@pytest.mark.world_size(1)
def test_eps_is_checked_where_a_layer_is_built_and_may_be_0_in_eval_mode():
    with pytest.raises(ValueError, match="eps must not be negative, got -0.001"):
        syncbn.SyncBatchNorm(3, eps=-1e-3)
    layer = syncbn.SyncBatchNorm(3, eps=0.0)
    try:
        want = F.batch_norm(X, torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3), eps=0.0)
    except ValueError:  # torch before 2.13, whose function the layer calls
        with pytest.raises(ValueError, match="eps must be positive"):
            layer.eval()(X)
    else:
        assert torch.equal(layer.eval()(X), want)
    with pytest.raises(ValueError, match=r"^SyncBatchNorm\(3\): eps must be positive in training"):
        layer.train()(X)


@pytest.mark.process_group
def test_a_dtensor_in_training_is_an_error_that_names_the_layer_and_the_remedy(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world.size,))
    layer = syncbn.SyncBatchNorm(3)
    layer.layer_name = "encoder.bn"
    x = DTensor.from_local(torch.randn(4, 3, 5), mesh, [Shard(0)])
    with pytest.raises(
        TypeError, match=r'^layer "encoder\.bn" \(SyncBatchNorm\(3\)\): a DTensor .* DTensor\.from_local\(layer\(x\.to_local\(\)\)'
    ):
        layer(x)
    y = DTensor.from_local(layer(x.to_local()), x.device_mesh, x.placements)
    assert y.shape == (4 * world.size, 3, 5) and float(y.detach().full_tensor().mean().abs()) < 1e-6


@pytest.mark.world_size(1)
@pytest.mark.parametrize("create_graph", [False, True], ids=["", "twice"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("size", [2, 3], ids=["as many pixels as channels", "more pixels"])
def test_a_hook_may_change_the_memory_format_of_what_the_layer_saves(implementation, activation, size, create_graph):
    """With pinned memory `save_on_cpu` gives back contiguous tensors."""
    x, residual, dy = (torch.randn(2, 4, size, size, dtype=torch.float64).to(memory_format=torch.channels_last) for _ in range(3))
    gradients = []
    for context in (nullcontext(), torch.autograd.graph.save_on_cpu(pin_memory=True)):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        with context:
            y = syncbn.sync_batch_norm(leaves[0], None, None, residual=leaves[1], activation=activation)
        gradients.append(torch.autograd.grad(y, leaves, dy, create_graph=create_graph))
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)
