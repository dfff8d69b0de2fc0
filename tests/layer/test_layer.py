"""The law: a layer on R ranks equals batch normalization of the whole batch, for any split of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncbn
from support.collectives import collectives
from support.layouts import channels_last
from support.oracle import TOLERANCE, activate, assert_close, batch_norm_step, rank_weighted_moments, relative_error
from support.step import SPLITS, check
from syncbn.activation import NAMES

SHAPES = [
    (7,),  # [N, C]
    (1, 1),  # one channel, one pixel
    (5, 3),  # [N, C, L]
    (3, 5, 7),  # primes: none is a multiple of a vector's length
    (16, 8, 8),
    (3, 2, 5, 3),  # [N, C, D, H, W]
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_batch_norm_of_the_whole_batch(world, counts, device, shape, dtype):
    check(world, counts, device, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_input_may_have_float32_parameters(world, counts, device, dtype):
    check(world, counts, device, (5, 4, 4), dtype, parameter_dtype=torch.float32)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5, 7), (3, 2, 5, 3)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_channels_last_stays_channels_last(world, counts, device, shape, residual):
    check(world, counts, device, shape, torch.float64, layout=channels_last, residual=residual, activation="relu")


def test_input_with_gaps_equals_the_whole_batch(world, counts, device):
    """A slice of a larger tensor, neither contiguous nor channels-last."""
    whole = torch.randn(sum(counts), 3, 4, 10, dtype=torch.float64)
    x = world.mine(whole, counts).to(device)[..., ::2]
    y = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=torch.float64).to(device)(x)
    want = batch_norm_step(whole[..., ::2], whole[..., ::2]).y
    assert_close(y, world.mine(want, counts), 1e-10, "y")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, *NAMES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_fused_activation_and_residual_equal_separate_ones(world, counts, device, dtype, activation, residual):
    check(world, counts, device, (3, 5, 7), dtype, activation=activation, residual=residual)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"unbiased": False}, {"eps": 0.1}, {"momentum": 0.3}],
    ids=str,
)
def test_every_option_equals_the_whole_batch(world, counts, device, options):
    check(world, counts, device, (5, 4, 4), torch.float64, **options)


def test_momentum_none_is_the_cumulative_average(world, counts, device):
    layer = syncbn.SyncBatchNorm(3, momentum=None, process_group=world.group, dtype=torch.float64).to(device)
    plain = nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    for step in range(3):
        whole = torch.randn(sum(counts), 3, 4, dtype=torch.float64) + step
        layer(world.mine(whole, counts).to(device))
        plain(whole)
    assert_close(layer.running_mean, plain.running_mean, 1e-12, "running_mean")
    assert_close(layer.running_var, plain.running_var, 1e-12, "running_var")
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_without_a_count_of_batches_statistics_move_as_torchs_do(world, counts, device, momentum):
    layer = syncbn.SyncBatchNorm(3, momentum=momentum, process_group=world.group, dtype=torch.float64).to(device)
    plain = nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    layer.num_batches_tracked = plain.num_batches_tracked = None
    whole = torch.randn(sum(counts), 3, 4, dtype=torch.float64) + 5
    layer(world.mine(whole, counts).to(device))
    plain(whole)
    assert_close(layer.running_mean, plain.running_mean, 1e-12, "running_mean")
    assert_close(layer.running_var, plain.running_var, 1e-12, "running_var")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_weighting_ranks_gives_each_rank_equal_weight(world, counts, device, activation):
    """The mean is that of the ranks' means, and the variance follows from the mean of their mean squares, as in Horovod's TensorFlow
    layer. The wanted gradients are those of autograd in float64."""
    whole = torch.randn(sum(counts), 3, 4, dtype=torch.float64) + torch.arange(sum(counts), dtype=torch.float64)[:, None, None]
    dy = torch.randn_like(whole)
    layer = syncbn.SyncBatchNorm(
        3, process_group=world.group, dtype=torch.float64, weighting="ranks", unbiased=False, activation=activation
    ).to(device)
    x = world.mine(whole, counts).to(device).requires_grad_()
    y = layer(x)
    y.backward(world.mine(dy, counts).to(device))

    whole.requires_grad_()
    mean, var = rank_weighted_moments(whole, counts)
    want = activate((whole - mean[:, None]) / (var + layer.eps).sqrt()[:, None], activation)
    want.backward(dy)
    assert_close(y, world.mine(want.detach(), counts), 1e-10, "y", want.detach())
    assert_close(x.grad, world.mine(whole.grad, counts), 1e-10, "dx", whole.grad)
    assert_close(layer.running_mean, 0.1 * mean.detach(), 1e-10, "running_mean")
    assert_close(layer.running_var, 0.9 + 0.1 * var.detach(), 1e-10, "running_var")


def test_weightings_agree_on_equal_batches(world):
    whole = torch.randn(2 * world.size, 3, 4, dtype=torch.float64)
    results = []
    for weighting in ("samples", "ranks"):
        layer = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=torch.float64, weighting=weighting)
        results.append((layer(world.mine(whole, (2,) * world.size)), layer.running_mean, layer.running_var))
    for one, other in zip(*results, strict=True):
        assert_close(one, other.detach(), 1e-12, "weighting")


@pytest.mark.world_size(2, 3, 4)
def test_unsynchronized_batch_norm_would_fail(world):
    """The oracle tells the two apart: otherwise the tests above would show nothing."""
    counts = SPLITS[world.size][0]
    whole = torch.randn(sum(counts), 3, 4, dtype=torch.float64)
    local = nn.BatchNorm1d(3, dtype=torch.float64)(world.mine(whole, counts))
    assert relative_error(local, world.mine(batch_norm_step(whole, whole).y, counts)) > 0.05


def test_results_of_a_repetition_are_bitwise_identical(world, counts, device):
    whole = torch.randn(sum(counts), 5, 9, 9)
    ys = []
    for _ in range(2):
        layer = syncbn.SyncBatchNorm(5, process_group=world.group, activation="relu").to(device)
        x = world.mine(whole, counts).to(device).requires_grad_()
        y = layer(x)
        y.sum().backward()
        ys.append((y, x.grad, layer.running_var))
    for one, other in zip(*ys, strict=True):
        assert torch.equal(one, other)


# ---- Collectives, and eval mode, which has none ---------------------------------------------------------------------------------


@pytest.mark.process_group
@pytest.mark.world_size(2, 3, 4)
def test_a_step_has_one_collective_each_way(world):
    """It has 2C + 4 and 2C + 2 float64 values, on any number of ranks, also if a batch is empty, or if input or parameters are frozen."""
    c = 5
    needs_grad = (True, world.rank == 0)
    for options, x_needs_grad, frozen in (
        *((o, n, False) for o in ({}, {"affine": False}) for n in needs_grad),
        ({}, world.rank == 0, True),
    ):
        layer = syncbn.SyncBatchNorm(c, **options).requires_grad_(not frozen)
        x = torch.randn(2 * world.rank, c, 3).requires_grad_(x_needs_grad)
        with collectives() as seen:
            y = layer(x)
        assert seen == [("allreduce", 2 * c + 4, torch.float64)]
        with collectives() as seen:
            y.sum().backward()
        assert seen == [("allreduce", 2 * c + 2, torch.float64)]
        assert (x.grad is not None) == x_needs_grad


@pytest.mark.process_group
@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "not tracking"])
def test_eval_never_communicates(world, track_running_stats):
    layer = syncbn.SyncBatchNorm(4, track_running_stats=track_running_stats, activation="relu").eval()
    plain = nn.BatchNorm2d(4, track_running_stats=track_running_stats).eval()
    x = torch.randn(3, 4, 5, 5, requires_grad=True) + world.rank
    with collectives() as seen:
        y = layer(x)
        y.sum().backward()
    assert seen == []
    assert_close(y, plain(x).relu().double().detach(), 2e-6, "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=["float32 parameters", "parameters of the input's type"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_eval_uses_the_running_statistics(world, dtype, parameter_dtype, activation):
    layer = syncbn.SyncBatchNorm(3, dtype=parameter_dtype or dtype, activation=activation).eval()
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean):
            t.copy_(torch.randn(3))
        layer.running_var.copy_(torch.rand(3) + 0.5)
    x, residual = torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)
    per_channel = lambda t: t.detach().double()[:, None, None]  # noqa: E731
    scale = per_channel(layer.weight) / (per_channel(layer.running_var) + layer.eps).sqrt()
    want = activate((x.double() - per_channel(layer.running_mean)) * scale + per_channel(layer.bias) + residual.double(), activation)
    y = layer(x, residual)
    assert y.dtype == dtype
    assert_close(y, want, 4 * TOLERANCE[dtype], "y")  # three roundings in the input's type: norm, sum, activation


def test_eval_without_running_stats_uses_the_local_batch(world):
    """torch's layer does the same."""
    layer = syncbn.SyncBatchNorm(3, track_running_stats=False, process_group=world.group).eval()
    x = torch.randn(4, 3, 5) + world.rank
    assert_close(layer(x), nn.BatchNorm1d(3, track_running_stats=False)(x).double().detach(), 2e-6, "y")


# ---- State, and groups of one rank ------------------------------------------------------------------------------------------------


def test_state_dict_is_torchs(world):
    ours, torchs = syncbn.SyncBatchNorm(6), nn.BatchNorm2d(6)
    describe = lambda m: {key: (t.shape, t.dtype) for key, t in m.state_dict().items()}  # noqa: E731
    assert describe(ours) == describe(torchs)
    for source, target in ((torchs, ours), (ours, torchs)):
        source(torch.randn(4, 6, 2, 2))
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.running_var, source.running_var)


@pytest.mark.process_group
@pytest.mark.world_size(2, 3, 4)
def test_a_group_of_one_rank_is_plain_batch_normalization(world):
    mine = syncbn.new_group(1)
    x = torch.randn(4, 3, 5) + world.rank
    layer = syncbn.SyncBatchNorm(3, process_group=mine)
    assert_close(layer(x), nn.BatchNorm1d(3)(x).double().detach(), 2e-6, "y")
