"""The law: a model that recomputes activations trains as one that keeps them; with `checkpoint_contexts` it exchanges no more often."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

import syncbn
from support.collectives import collectives
from support.oracle import assert_close
from syncbn.checkpoint import Log, logs, replayed


def ours(function, *args):
    return checkpoint(function, *args, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)


def no_contexts(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def nested(function, *args):
    return ours(lambda *a: ours(function, *a), *args)


def saving_convolutions():
    """The contexts of selective checkpointing, which sees each op in both passes."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.convolution.default else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def selective(function, *args):
    contexts = functools.partial(syncbn.checkpoint_contexts, saving_convolutions)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def selective_inside(function, *args):
    """The inner checkpoint is recomputed outside of the outer one's contexts."""
    return ours(lambda *a: checkpoint(function, *a, use_reentrant=False, context_fn=saving_convolutions), *args)


def two_of_two(function, *args):
    """The block in two checkpoints inside one."""
    return ours(lambda x: ours(function[4:], ours(function[:4], x)), *args)


EXACT = [ours, nested, selective, two_of_two]  # no exchange and no update in the recomputation
DETECTED = [no_contexts, reentrant]  # an exchange, but no update


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv1d(4, 3, 1), nn.BatchNorm1d(3), nn.Tanh()
    ).double()


def train(model, run, x, steps=2):
    """The gradients of x and everything else that training leaves."""
    torch.manual_seed(1)  # dropout
    for _ in range(steps):
        x = x.detach().requires_grad_()
        y = run(model, x)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("early_stop", [True, False], ids=["early-stop", "to-the-end"])
@pytest.mark.parametrize("method", [*EXACT, *DETECTED, selective_inside])
def test_checkpointed_training_equals_training(world, counts, method, early_stop):
    """Outputs, gradients and moving statistics, bit for bit: the recomputation has the same statistics and adds nothing to them."""
    x = world.mine(torch.randn(sum(counts), 3, 4, dtype=torch.float64), counts)
    results = []
    for run in (lambda model, x: model(x), method):
        model = syncbn.convert_sync_batchnorm(block(), world.group)
        with set_checkpoint_early_stop(early_stop):
            results.append(train(model, run, x))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.process_group
@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("method", EXACT)
def test_recomputation_exchanges_nothing(world, method):
    model = syncbn.convert_sync_batchnorm(block())
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with collectives() as seen:
        train(model, method, x, steps=1)
    assert [length for _, length, _ in seen] == [12, 10, 8, 10]  # C is 4, then 3: 2C + 4 values forward, 2C + 2 backward


@pytest.mark.process_group
@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("method", DETECTED)
def test_without_the_contexts_a_recomputation_exchanges_again(world, method):
    """It does so in the same order on every rank. The moving statistics are not updated again, as the first test above shows."""
    model = syncbn.convert_sync_batchnorm(block())
    with collectives() as seen:
        train(model, method, torch.randn(4, 3, 5, dtype=torch.float64), steps=1)
    assert [length for _, length, _ in seen] == [12, 10, 12, 10, 8, 10]


@pytest.mark.parametrize("order", ["first in, first out", "last in, first out"])
def test_outstanding_checkpoints_keep_their_own_statistics(world, counts, order):
    """As in pipeline schedules: several forward passes of the same layers before the first backward pass."""
    xs = [world.mine(torch.randn(sum(counts), 3, 4, dtype=torch.float64) + i, counts) for i in range(3)]
    results = []
    for run in (lambda model, x: model(x), ours):
        torch.manual_seed(1)
        model = syncbn.convert_sync_batchnorm(block(), world.group)
        model[3].p = 0.0
        leaves = [x.clone().requires_grad_() for x in xs]
        losses = [run(model, x).square().sum() for x in leaves]
        for loss in losses if order.startswith("first") else reversed(losses):
            loss.backward()
        results.append([*(x.grad for x in leaves), *(p.grad for p in model.parameters()), *model.buffers()])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_a_second_backward_pass_replays_from_the_start(world):
    model = syncbn.convert_sync_batchnorm(block(), world.group)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    loss = ours(model, x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    buffers = [b.clone() for b in model.buffers()]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_a_layer_called_twice_in_a_checkpoint_trains_as_without(world, counts):
    x = world.mine(torch.randn(sum(counts), 3, 4, dtype=torch.float64), counts)
    results = []
    for run in (lambda f, x: f(x), ours):
        layer = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=torch.float64)
        results.append(train(layer, lambda layer, x, run=run: run(lambda x: layer(layer(x).sin() + 1), x), x))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_double_backward_through_a_checkpoint_equals_that_without(world, counts):
    x = world.mine(torch.randn(sum(counts), 3, 4, dtype=torch.float64), counts)
    results = []
    for run in (lambda f, x: f(x), ours):
        model = syncbn.convert_sync_batchnorm(block(), world.group)
        model[3].p = 0.0
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(run(model, leaf).square().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for got, want in zip(*results, strict=True):
        assert_close(got, want.double(), 1e-12, "gradient")


def test_eval_mode_logs_nothing(world, monkeypatch):
    monkeypatch.setattr(Log, "append", lambda *_: pytest.fail("has logged statistics"))
    model = syncbn.convert_sync_batchnorm(block(), world.group).eval()
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    y = ours(model, x)
    y.sum().backward()
    assert torch.equal(y, model(x)) and x.grad is not None


def test_no_grad_leaves_nothing_behind(world):
    model = syncbn.convert_sync_batchnorm(block(), world.group)
    with torch.no_grad():
        ours(model, torch.randn(4, 3, 5, dtype=torch.float64))
    assert logs() == () and replayed() is None
    assert model[1].num_batches_tracked == 1
    model(torch.randn(4, 3, 5, dtype=torch.float64))
    assert model[1].num_batches_tracked == 2


@pytest.mark.world_size(1)
def test_another_order_of_layers_is_an_error():
    """A layer never gets the statistics of another one."""
    layers = [syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(5)]
    x = torch.randn(4, 3, requires_grad=True)
    calls = []

    def forward(x):
        calls.append(None)
        layer = layers[len(calls) - 1]
        return layer(x if layer.num_features == 3 else x.repeat(1, 2)[:, :5])[:, :3].sin()

    loss = ours(forward, x).sum()
    with pytest.raises(RuntimeError, match=r"call 0 is SyncBatchNorm\(5\) with 5 channels, but was SyncBatchNorm\(3\) with 3"):
        loss.backward()
    with pytest.raises(RuntimeError, match="layer is called more often than in the forward pass"):
        Log().replay("layer", 3)
