"""Horovod's published worked example, and its weighting of unequal batches: statistics, outputs and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from support.oracle import assert_close, rank_weighted_moments, relative_error
from syncbn import SyncBatchNorm, SyncBatchNormalization, ops, reference

EXAMPLE = json.loads(Path(__file__).with_name("keras_horovod_worked_example.json").read_text())
STATISTIC = 1.2e-7  # half a unit of the last printed digit, and one float32 rounding in TensorFlow
OUTPUT = 2e-6  # TensorFlow computes x * scale + shift in float32: at scale 28 it rounds numbers near 18, not near 1


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def assert_printed(got, want, tolerance, what):
    error = (got.detach().double() - tensor(want, torch.float64)).abs().max().item()
    assert error <= tolerance, f"{what}: off by {error:.1e} > {tolerance:.0e}"


def example_layer(world, **options):
    return SyncBatchNormalization(momentum=0.5, epsilon=1e-3, moving_mean_initializer="ones", process_group=world.group, **options)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_worked_example_on_one_process(world, dtype):
    """Two training steps, then inference with the frozen ("estimated") values."""
    data, printed = EXAMPLE["single_process"], EXAMPLE["single_process"]["printed"]
    layer = example_layer(world, dtype=dtype)
    x = tensor(data["x_step0"], dtype)
    mean, var, _ = reference.finalize(ops.stats(x.movedim(-1, 1), True), layer.epsilon)
    assert_printed(mean, printed["batch_mean_step0"], STATISTIC, "batch mean")
    assert_printed(var, printed["batch_var_step0"], STATISTIC, "batch variance")
    assert_printed(layer(x, training=True), printed["y_step0"], OUTPUT, "outputs")
    assert_printed(layer.moving_mean, printed["moving_mean_step0"], STATISTIC, "moving mean after one step")
    assert_printed(layer.moving_variance, printed["moving_var_step0"], STATISTIC, "moving variance after one step")
    layer(tensor(data["x_step1"], dtype), training=True)
    assert_printed(layer.moving_mean, printed["moving_mean_step1"], STATISTIC, "moving mean after two steps")
    assert_printed(layer.moving_variance, printed["moving_var_step1"], STATISTIC, "moving variance after two steps")
    assert_printed(layer(tensor(data["x_infer"], dtype), training=False), printed["y_infer"], OUTPUT, "inference")


@pytest.mark.world_size(1)
def test_worked_example_of_the_fused_operation(world):
    """By torch's convention, which SyncBatchNorm has, the moving variance averages the Bessel-corrected variances."""
    x, printed = tensor(EXAMPLE["single_process"]["x_step0"]).movedim(-1, 1), EXAMPLE["single_process"]["fused_printed"]
    layer = SyncBatchNorm(3, eps=1e-3, momentum=0.5)
    nn.init.ones_(layer.running_mean)
    y = layer(x)
    mean, _, invstd = reference.finalize(ops.stats(x, False), layer.eps)
    assert_printed(y.movedim(1, -1), EXAMPLE["single_process"]["printed"]["y_step0"], OUTPUT, "outputs")
    assert_printed(layer.running_mean, printed["moving_mean"], STATISTIC, "moving mean")
    assert_printed(layer.running_var, printed["moving_var"], STATISTIC, "moving variance")
    assert_printed(mean, printed["saved_mean"], STATISTIC, "saved mean")
    for got, want in zip(invstd, printed["saved_inv_std"], strict=True):
        assert_printed(got, want, STATISTIC * want, "saved inverse standard deviation")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("weighting", ["ranks", "samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_worked_example_on_two_ranks(world, dtype, weighting):
    data, printed = EXAMPLE["two_ranks"], EXAMPLE["two_ranks"]["printed"]
    layer = example_layer(world, dtype=dtype, weighting=weighting)
    x = tensor(data[f"x_rank{world.rank}"], dtype)
    stats = sum(world.all_gather(ops.stats(x.movedim(-1, 1), weighting == "ranks")))
    mean, var, _ = reference.finalize(stats, layer.epsilon)
    layer(x, training=True)
    assert_printed(mean, printed["group_mean"], STATISTIC, "group mean")
    assert_printed(var, printed["group_var"], STATISTIC, "group variance")
    assert_printed(layer.moving_mean, printed["moving_mean"], STATISTIC, "moving mean")
    assert_printed(layer.moving_variance, printed["moving_var"], STATISTIC, "moving variance")


@pytest.mark.world_size(2)
def test_gradients_of_the_worked_example_are_tensorflows(world):
    data = EXAMPLE["two_ranks"]
    want = {key: tensor(value, torch.float64) for key, value in data["computed_with_gamma_beta"].items()}
    layer = example_layer(world, num_features=3, dtype=torch.float64)
    with torch.no_grad():
        layer.gamma.copy_(want["gamma"])
        layer.beta.copy_(want["beta"])
    x = tensor(data[f"x_rank{world.rank}"], torch.float64).requires_grad_()
    y = layer(x)
    y.backward(want[f"dy_rank{world.rank}"])
    # 16 digits are given. The formula in float64 loses two of them: a variance of 0.005 is the difference of two numbers near 0.4
    assert_close(y, want[f"y_rank{world.rank}"], 1e-12, "y")
    assert_close(x.grad, want[f"dx_rank{world.rank}"], 1e-12, "dx")
    assert_close(sum(world.all_gather(layer.gamma.grad)), want["dgamma_sum_over_ranks"], 1e-12, "dgamma")
    assert_close(sum(world.all_gather(layer.beta.grad)), want["dbeta_sum_over_ranks"], 1e-12, "dbeta")


# ---- Weighting --------------------------------------------------------------------------------------------------------------------

COUNTS = {1: (7,), 2: (6, 1), 3: (4, 2, 1), 4: (3, 0, 2, 2)}


@pytest.mark.parametrize("weighting", ["ranks", "samples"])
def test_unequal_batches_against_autograd_of_the_formula(world, weighting):
    counts = COUNTS[world.size]
    rows = torch.arange(sum(counts), dtype=torch.float64)[:, None, None]
    whole = torch.randn(sum(counts), 5, 3, dtype=torch.float64) + rows  # a rank's place in the batch shows in its mean
    dy = torch.randn_like(whole)
    layer = SyncBatchNormalization(momentum=0.75, weighting=weighting, num_features=3, dtype=torch.float64, process_group=world.group)
    with torch.no_grad():
        layer.gamma.copy_(torch.randn(3))
        layer.beta.copy_(torch.randn(3))
    x = world.mine(whole, counts).requires_grad_()
    y = layer(x)
    y.backward(world.mine(dy, counts))

    whole.requires_grad_()
    gamma, beta = (t.detach().clone().requires_grad_() for t in (layer.gamma, layer.beta))
    mean, var = rank_weighted_moments(whole.movedim(-1, 1), counts if weighting == "ranks" else (sum(counts),))
    want = (whole - mean) / (var + 1e-3).sqrt() * gamma + beta
    want.backward(dy)
    assert_close(y, world.mine(want.detach(), counts), 1e-10, "y", want.detach())
    assert_close(x.grad, world.mine(whole.grad, counts), 1e-10, "dx", whole.grad)
    assert_close(sum(world.all_gather(layer.gamma.grad)), gamma.grad, 1e-10, "dgamma")
    assert_close(sum(world.all_gather(layer.beta.grad)), beta.grad, 1e-10, "dbeta")
    assert_close(layer.moving_mean, 0.25 * mean.detach(), 1e-10, "moving mean")
    assert_close(layer.moving_variance, 0.75 + 0.25 * var.detach(), 1e-10, "moving variance")
    if world.size > 1:  # this data tells the two weightings apart
        other = rank_weighted_moments(whole.detach().movedim(-1, 1), (sum(counts),) if weighting == "ranks" else counts)
        assert relative_error(layer.moving_mean, 0.25 * other[0]) > 0.01
