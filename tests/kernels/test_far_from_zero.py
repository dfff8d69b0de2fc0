"""The laws of accuracy: as good as torch's in float64 however far from zero, and no place of the data is worse than another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.layouts import every_layout
from support.op_checks import check_moved_all_the_way
from syncbn import SyncBatchNorm, ops, reference
from syncbn.activation import Activation

pytestmark = pytest.mark.world_size(1)


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [ops, reference], ids=["kernels", "reference"])


def exact_step(x, dy, eps=1e-5):
    """y, dx and the running statistics after one step with momentum 1, about a mean that is known to the last digit.

    Far from zero x - first is exact, and everywhere it is small, so its own mean and variance are right to 1e-16."""
    dims = (0, *range(2, x.dim()))
    d = x - x.flatten(2)[:1, :, :1].view(1, -1, *[1] * (x.dim() - 2))
    offset = d.mean(dims, keepdim=True)
    var = (d - offset).square().mean(dims, keepdim=True)
    invstd = (var + eps).rsqrt()
    xhat = (d - offset) * invstd
    dx = invstd * (dy - dy.mean(dims, keepdim=True) - xhat * (dy * xhat).mean(dims, keepdim=True))
    count = x.numel() // x.shape[1]
    return xhat, dx, (x - d + offset).mean(dims), var.flatten() * count / (count - 1)


@every_layout
@IMPLEMENTATIONS
@pytest.mark.parametrize("far", [0.0, 1e4, 1e6, 1e8])
def test_float64_is_within_ten_times_torchs_error_and_keeps_its_digits(far, implementation, layout, monkeypatch):
    for name in ops.SCHEMAS:
        monkeypatch.setattr(ops, name, getattr(implementation, name))
    x = layout(torch.randn(16, 5, 12, 12, dtype=torch.float64) + far)
    dy = layout(torch.randn_like(x))
    errors = []
    for layer in (SyncBatchNorm(5, momentum=1.0), nn.BatchNorm2d(5, momentum=1.0)):
        layer.double()
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        got = (y, leaf.grad, layer.running_mean, layer.running_var)
        errors.append([float(((a.detach() - b).abs() / b.abs().clamp(min=1)).max()) for a, b in zip(got, exact_step(x, dy), strict=True)])
    for what, mine, torchs in zip(("y", "dx", "running_mean", "running_var"), *errors, strict=True):
        assert mine <= 10 * max(torchs, 1e-15), f"{what}: off by {mine:.1e}, torch by {torchs:.1e}"
        # Each value differs from the shift by a few standard deviations, exactly, and mean = hi + lo keeps the 1e-8 that a float64 at 1e8,
        # such as torch's mean, rounds off.
        assert mine <= 1e-12, f"{what}: off by {mine:.1e}"


@IMPLEMENTATIONS
def test_a_common_shift_of_zero_would_lose_the_variance(implementation):
    """Ranks that can only add sums have a common shift of 0: the law above fails by far."""
    x = torch.randn(16, 5, 144, dtype=torch.float64) + 1e8
    want = x.var((0, 2), correction=0)
    for shifted, holds in ((True, True), (False, False)):
        var = reference.finalize(implementation.stats(x, False, shifted), 0.0)[1]
        assert bool(((var - want).abs() / want).max() < 1e-6) == holds


# A chunk is 512 rows or 16384 values of a plane at most (csrc/cpu/traverse.h), 1024 values of a channel in the reference.
PADDED = {
    "the first rows of a chunk": (lambda x: x[:16].zero_(), (4096, 6)),
    "an eighth of every other chunk": (lambda x: x.view(-1, 64, 6)[::16].zero_(), (8192, 6)),
    "the head of each plane": (lambda x: x[:, :, :128].zero_(), (6, 4, 16384)),
    "the top of short planes": (lambda x: x[:2, :, :40].zero_(), (7, 40, 196)),
    "the first sample": (lambda x: x[:1].zero_(), (64, 8, 49)),
}


@every_layout
@IMPLEMENTATIONS
@pytest.mark.parametrize("where", PADDED)
def test_zeros_in_data_at_1000_cost_no_digits(where, implementation, layout):
    pad, shape = PADDED[where]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1000
    pad(x)
    x = layout(x)
    var = reference.finalize(implementation.stats(x, False, True), 0.0)[1]
    want = x.double().movedim(1, 0).flatten(1).var(1, correction=0)
    assert ((var - want).abs() / want).max() < 1e-6


@IMPLEMENTATIONS
def test_moving_statistics_are_the_batchs_if_nothing_of_the_old_ones_is_kept(implementation):
    check_moved_all_the_way(implementation)


@IMPLEMENTATIONS
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 1e-9, 1 - 1e-9, 1.5, -0.1])
def test_moving_statistics_move_by_the_momentum(implementation, momentum):
    """The result is right to a few roundings of float64 numbers of size 1; what does not change is bitwise identical."""
    x = torch.randn(50, 3, dtype=torch.float64)
    stats = ops.stats(x, False, True)
    mean, var, _ = reference.finalize(stats, 0.0)
    old = torch.randn(2, 3, dtype=torch.float64)
    state = (old[0].clone(), old[1].clone(), None)
    implementation.normalize(x, stats, None, None, None, *state, momentum, False, 1e-5, Activation.none, 0.0)
    for new, before, target in zip(state, old, (mean, var), strict=False):
        assert torch.allclose(new, (1 - momentum) * before + momentum * target, rtol=1e-14, atol=1e-15)
    # The targets are the implementation's: if a compiler fuses a product and a difference, its last bit is another than the reference's.
    targets = (torch.zeros(3).double(), torch.zeros(3).double(), None)
    implementation.normalize(x, stats, None, None, None, *targets, 1.0, False, 1e-5, Activation.none, 0.0)
    still = (targets[0].clone(), targets[1].clone(), None)
    implementation.normalize(x, stats, None, None, None, *still, momentum, False, 1e-5, Activation.none, 0.0)
    assert torch.equal(still[0], targets[0]) and torch.equal(still[1], targets[1])
