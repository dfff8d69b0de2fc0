"""`batch_norm` and `batch_norm_backward`, both ops of a direction in one call: what they compute, and when a step calls them."""

from __future__ import annotations

import pytest
import torch

import syncbn
from support.layouts import every_layout
from syncbn import ops
from syncbn.activation import Activation

pytestmark = pytest.mark.world_size(1)


@pytest.mark.parametrize("rank_weighted", [False, True])
@every_layout
def test_one_call_gives_the_bits_of_two(layout, rank_weighted, device):
    x, dy = (layout(torch.randn(2, 3, 4, 5, device=device)) for _ in range(2))
    weight, bias = torch.randn(2, 3, device=device)
    epilogue = (1e-5, Activation.silu, 0.01)

    def running():
        return torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(7, device=device)

    one, two = running(), running()
    y, stats = ops.batch_norm(x, weight, bias, *one, 0.1, True, *epilogue, rank_weighted)
    want_stats = ops.stats(x, rank_weighted, True)
    want_y, _ = ops.normalize(x, want_stats, weight, bias, None, *two, 0.1, True, *epilogue)
    kept = (x, stats, weight, bias, None, None, *epilogue)
    sums, *parameters = ops.backward_reduce(dy, *kept)
    want_dx, _ = ops.backward_input(dy, sums, *kept, rank_weighted)
    got = (y, stats, *one, *ops.batch_norm_backward(dy, x, stats, weight, bias, *epilogue, rank_weighted))
    for a, b in zip(got, (want_y, want_stats, *two, want_dx, *parameters), strict=True):
        assert torch.equal(a, b)


STEPS = {  # (does the input require a gradient, is there a residual, activation): the ops that a step of a single process calls
    (True, False, "relu"): ["batch_norm", "batch_norm_backward"],
    (False, False, "relu"): ["batch_norm", "backward_reduce"],
    (True, True, None): ["stats", "normalize", "batch_norm_backward"],
    (True, True, "relu"): ["stats", "normalize", "backward_reduce", "backward_input"],
}


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_step_calls_no_more_ops_than_it_needs(step, monkeypatch):
    requires_grad, has_residual, activation = step
    called = []

    def noting(name):
        op = getattr(ops, name)
        return lambda *args: called.append(name) or op(*args)

    for name in ops.SCHEMAS:
        monkeypatch.setattr(ops, name, noting(name))
    x = torch.randn(4, 3, requires_grad=requires_grad)
    syncbn.SyncBatchNorm(3, activation=activation)(x, torch.randn(4, 3) if has_residual else None).sum().backward()
    assert called == STEPS[step]
