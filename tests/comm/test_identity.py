"""What the ranks call a layer: two layers that are not the same are a mismatch, and other differences between ranks are not."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import syncbn
from syncbn import RankMismatchError, SyncBatchNorm, environment

pytestmark = pytest.mark.world_size(2, 3, 4)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(environment, "settings", environment.settings._replace(check="always"))


def step(*layers: nn.Module, channels: int = 3) -> None:
    y = torch.randn(4, channels, 5, requires_grad=True)
    for layer in layers:
        y = layer(y)
    y.sum().backward()


# ---- Mismatches --------------------------------------------------------------------------------------------------------------


def test_unnamed_layers_of_equal_size_in_another_order_are_a_mismatch(world):
    a, b = SyncBatchNorm(3, process_group=world.group), SyncBatchNorm(3, process_group=world.group)
    step(a, b)
    with pytest.raises(RankMismatchError, match=r"forward of unnamed layer \d+, 3 channels"):
        step(*((a, b) if world.rank == 0 else (b, a)))


def test_a_copy_of_an_unnamed_layer_is_another_layer(world):
    a = SyncBatchNorm(3, process_group=world.group)
    b = copy.deepcopy(a)
    step(a)
    step(b)
    with pytest.raises(RankMismatchError, match="unnamed layer"):
        step(a if world.rank == 0 else b)


@pytest.mark.parametrize("length", [100, 1000, 10_000])
def test_long_names_that_differ_in_the_middle_are_a_mismatch(world, length):
    layer = SyncBatchNorm(3, process_group=world.group)
    layer.layer_name = "encoder." + "x" * length + ("left" if world.rank == 0 else "right") + "y" * length + ".norm"
    with pytest.raises(RankMismatchError) as error:
        step(layer)
    text = str(error.value)
    assert "encoder.xxx" in text and 'yyy.norm"' in text
    assert ("left" in text and "right" in text) == (length < 10_000)  # longer ones are shown in part


def test_named_and_unnamed_layers_are_a_mismatch(world):
    layer = SyncBatchNorm(3, process_group=world.group)
    if world.rank == 0:
        layer.layer_name = "norm"
    with pytest.raises(RankMismatchError, match='layer "norm"'):
        step(layer)


# ---- No mismatch -------------------------------------------------------------------------------------------------------------


def build_more(world, layers):
    """A teacher, or a copy for evaluation, that the other ranks do not have."""
    if world.rank == 0:
        teacher = nn.Sequential(*[SyncBatchNorm(3, process_group=world.group) for _ in range(3)]).eval()
        teacher(torch.randn(4, 3, 5))
    return [SyncBatchNorm(3, process_group=world.group), *layers]


def copy_on_one_rank(world, layers):
    copies = copy.deepcopy(nn.Sequential(*layers))
    return list(copies) if world.rank == 0 else layers


def copy_everywhere(world, layers):
    return [*layers, *copy.deepcopy(nn.Sequential(*layers))]


def drop_and_build_again(world, layers):
    step(*layers)
    layers.clear()
    gc.collect()
    return [SyncBatchNorm(3, process_group=world.group) for _ in range(2)]


def convert_later_on_one_rank(world, layers):
    """The layers have exchanged before rank 0 gives them names."""
    step(*layers)
    if world.rank == 0:
        syncbn.convert_sync_batchnorm(nn.Sequential(*layers), world.group)
    return layers


def revert_on_one_rank(world, layers):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), world.group)
    step(*model)
    if world.rank == 0:
        syncbn.convert_sync_batchnorm(syncbn.revert_sync_batchnorm(model), world.group)
    return [*model, *layers]


def subclass_on_one_rank(world, layers):
    class Mine(SyncBatchNorm):
        pass

    return [(Mine if world.rank == 0 else SyncBatchNorm)(3, process_group=world.group), *layers]


def trace_on_one_rank(world, layers):
    """As TensorBoard's add_graph does, with the model in training mode."""
    if world.rank == 0:
        with pytest.raises(RuntimeError, match="trace the model in eval mode"):
            torch.jit.trace(layers[0], torch.randn(4, 3, 5), strict=False, check_trace=False)
    return layers


def fail_on_one_rank(world, layers):
    """A call that fails before its exchange does not count, and gives the layer no number."""
    if world.rank == 0:
        for without_values in (torch.device("meta"), FakeTensorMode()):
            with without_values, pytest.raises(RuntimeError, match="has no values that the ranks could exchange"):
                SyncBatchNorm(3, process_group=world.group)(torch.empty(4, 3, 5))
    return layers


def vectorize_gradients_on_one_rank(world, layers):
    x = torch.randn(4, 3, requires_grad=True)
    y = layers[0](x).square().sum(0)
    gradient = partial(torch.autograd.grad, y, x, retain_graph=True)
    if world.rank == 0:
        for together in (partial(gradient, is_grads_batched=True), torch.func.vmap(gradient)):
            with pytest.raises(RuntimeError, match=r"several gradients in one call .* compute one after the other\n.* not the cause"):
                together(torch.eye(3))
    for direction in torch.eye(3):
        gradient(direction)
    return layers


DIFFERENCES = [
    build_more,
    copy_on_one_rank,
    copy_everywhere,
    drop_and_build_again,
    convert_later_on_one_rank,
    revert_on_one_rank,
    subclass_on_one_rank,
    trace_on_one_rank,
    fail_on_one_rank,
    vectorize_gradients_on_one_rank,
]


@pytest.mark.parametrize("differ", DIFFERENCES, ids=lambda function: function.__name__)
def test_ranks_that_differ_only_in_what_they_do_not_exchange_are_in_step(world, differ):
    layers = [SyncBatchNorm(3, process_group=world.group) for _ in range(2)]
    layers = differ(world, layers)
    for _ in range(2):
        step(*layers)
