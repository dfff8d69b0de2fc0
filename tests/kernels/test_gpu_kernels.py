"""The compiled CUDA kernels on a GPU: the table of the emulation, and what an emulation cannot show."""

from __future__ import annotations

import inspect

import pytest
import torch

from support.op_cases import EPS, SLOPE, Case, make, table
from support.op_checks import CHECKS, check_moved_all_the_way, check_stats
from support.spoiled import ALL, CASES, error_of_the_variance
from syncbn import native, ops, reference
from syncbn.activation import Activation, keeps_residual

pytestmark = [pytest.mark.gpu, pytest.mark.world_size(1)]

SOME = [Case((40, 256), dtype=torch.bfloat16, activation="relu", residual=True), Case((8, 24, 31, 31), activation="silu", momentum=None)]
# Layers of ResNet-50 at batch 32. The table's tensors have at most 1e5 elements, so its grids are smaller than these.
REAL = [
    Case((32, 64, 112, 112), dtype=torch.bfloat16, activation="relu"),
    Case((32, 64, 112, 112), True, torch.bfloat16, activation="relu"),
    Case((32, 256, 56, 56), dtype=torch.bfloat16, activation="relu", residual=True),
    Case((32, 256, 56, 56), True, torch.bfloat16, activation="relu", residual=True),
]


@pytest.fixture(autouse=True)
def native_kernels():
    cuda = next(library for library in native.status() if library.device == "cuda")
    assert cuda.loaded, cuda.reason


def step(case: Case):
    """Calls all four ops once, each with the outputs of the ones before. Returns what a repetition must give bitwise identically."""
    d = make(case, "cuda")
    stats = ops.stats(d.x, case.rank_weighted, case.shifted)
    state = (d.running_mean, d.running_var, d.tracked)
    y, mask = ops.normalize(d.x, stats, d.weight, d.bias, d.residual, *state, case.momentum, case.unbiased, EPS, case.fused, SLOPE)
    residual = d.residual if keeps_residual(case.fused, True) else None
    how = (d.weight, d.bias, residual, mask if case.keeps_mask else None, EPS, case.fused, SLOPE)
    sums, dweight, dbias = ops.backward_reduce(d.dy, d.x, stats, *how)
    dx, dz = ops.backward_input(d.dy, sums, d.x, stats, *how)
    return [stats, y, sums, dweight, dbias, dx, dz, *(t for t in state if t is not None)]


@pytest.mark.parametrize("case", table(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_equals_the_reference(op, case):
    CHECKS[op](ops, case, "cuda")


@pytest.mark.parametrize("case", REAL, ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_a_tensor_as_large_as_in_a_real_network_is_right_too(op, case):
    CHECKS[op](ops, case, "cuda")


def test_moving_statistics_are_the_batchs_if_nothing_of_the_old_ones_is_kept():
    check_moved_all_the_way(ops, "cuda")


@pytest.mark.parametrize("case", [*SOME, Case((33, 24, 2, 2), True, activation="silu", residual=True)], ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_misaligned_views_match_aligned_tensors(op, case):
    def shifted(t):
        if not isinstance(t, torch.Tensor) or t.shape != case.shape:
            return t
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].as_strided(t.shape, t.stride()).copy_(t)

    class Shifted:
        def __getattr__(self, name):
            return lambda *arguments: getattr(ops, name)(*map(shifted, arguments))

    CHECKS[op](Shifted(), case, "cuda")


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_repetition_is_bitwise_identical(case):
    first = step(case)
    for _ in range(5):
        for a, b in zip(first, step(case), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_streams_do_not_share_a_workspace(case):
    want = step(case)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(case))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(want, result, strict=True))


def test_a_graph_replays_bitwise_identically_on_any_stream():
    x = torch.randn(8, 4, 64, 64, device="cuda")  # few channels: blocks share sums
    want = ops.stats(x, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a stream that has never run an op: the workspace is made while capturing
        got = ops.stats(x, False)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for stream in (torch.cuda.current_stream(), other):
        with torch.cuda.stream(stream):
            for _ in range(3):
                graph.replay()
        stream.synchronize()
        assert torch.equal(got, want)
    assert torch.equal(ops.stats(x, False), want)


def test_no_op_waits_for_the_device():
    step(SOME[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = torch.randn(4, 8, 16, 16, device="cuda")
        stats = ops.stats(x, False)
        ops.normalize(x, stats, None, None, None, None, None, None, 0.1, True, EPS, Activation.relu, SLOPE)
        sums, *_ = ops.backward_reduce(x, x, stats, None, None, None, None, EPS, Activation.relu, SLOPE)
        ops.backward_input(x, sums, x, stats, None, None, None, None, EPS, Activation.relu, SLOPE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_error_matches_torchs():
    x = torch.zeros(8, 64, 256, 256, device="cuda")
    stats = ops.stats(x, False)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(RuntimeError, match=r"CUDA out of memory. syncbn could not allocate a tensor \[8, 64, 256, 256\]"):
            ops.normalize(x, stats, None, None, None, None, None, None, 0.1, True, EPS, Activation.none, SLOPE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_elements(channels_last):
    shape = (2, 8, 2**27 + 9)  # 2^31 + 144
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < 20:  # x, dy, dx and dz of 4 GB each, the mask, and what counts their elements
        pytest.skip(f"needs 20 GB of GPU memory, {free} are free")

    def full(value):
        t = torch.full((shape[0], shape[2], shape[1]) if channels_last else shape, value, dtype=torch.bfloat16, device="cuda")
        return t.movedim(-1, 1) if channels_last else t

    def only_at_the_end(t):
        assert t.count_nonzero() == 2
        return t[-1, -1, -64::63].tolist()

    x = full(0.0)
    x[-1, -1, -64::63] = 3.0  # the very last element, and one of a vector
    stats = ops.stats(x, False)
    assert stats[15] == 6 and stats[23] == 18 and stats[:15].count_nonzero() == 0 and stats[24] == 2 * shape[2]
    # mean 0 and var 1 for all channels, count 1
    stats = torch.tensor([0.0] * 16 + [1.0] * 10 + [0.0] * 2, dtype=torch.float64, device="cuda")
    y, mask = ops.normalize(x, stats, None, None, x, None, None, None, 0.1, True, 0.0, Activation.relu, SLOPE)
    assert only_at_the_end(y) == [6, 6]
    del y
    dy, how = full(1.0), (None, None, None, mask, 0.0, Activation.relu, SLOPE)
    sums, *_ = ops.backward_reduce(dy, x, stats, *how)
    assert sums.tolist() == [0] * 7 + [2] + [0] * 7 + [6, 0, 0]
    dx, dz = ops.backward_input(dy, sums / 64, x, stats, *how)
    assert only_at_the_end(dz) == [1, 1]
    assert dx[-1, -1, -64::63].tolist() == [1 - 2 / 64 - 3 * 6 / 64] * 2 and dx[:, :-1].count_nonzero() == 0
    # At the other elements of the last channel x and dz are 0, and dx is what is left: -sum_dy / n.
    assert (dx[:, -1] == -2 / 64).sum() == 2 * shape[2] - 2


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("op", ["normalize", "backward_reduce", "backward_input"])
def test_an_argument_on_another_device_is_named(op, activation):
    class Elsewhere:
        def __getattr__(self, name):
            def call(*arguments):
                for i, argument in enumerate(list(inspect.signature(getattr(reference, name)).parameters)[: len(arguments)]):
                    if isinstance(arguments[i], torch.Tensor):
                        with pytest.raises((ValueError, RuntimeError), match=rf"\b{argument} must be on a CUDA device"):
                            getattr(ops, name)(*arguments[:i], arguments[i].cpu(), *arguments[i + 1 :])
                return getattr(ops, name)(*arguments)

            return call

    CHECKS[op](Elsewhere(), Case((4, 6, 5, 5), activation=activation, residual=True), "cuda")


@pytest.mark.parametrize("name", ["x", "stats", "weight", "bias", "residual", "running_mean", "num_batches_tracked", "activation", "alarm"])
def test_invalid_argument_is_named(name):
    x = torch.randn(4, 6, 5, 5, device="cuda")
    stats = ops.stats(x, False)
    good = dict(
        x=x, stats=stats, weight=None, bias=None, residual=None,
        running_mean=torch.ones(6, device="cuda"), running_var=torch.ones(6, device="cuda"), num_batches_tracked=None,
        momentum=0.1, eps=EPS, unbiased=True, activation=Activation.none, negative_slope=SLOPE,
    )  # fmt: skip
    bad = {
        "x": x[:, :, ::2],
        "stats": stats[:-1],
        "weight": torch.ones(5, device="cuda"),
        "bias": torch.ones(6),
        "residual": x.bfloat16(),
        "running_mean": torch.ones(12, device="cuda"),
        "num_batches_tracked": torch.tensor(0, device="cuda", dtype=torch.int32),
        "activation": 4,
        "alarm": torch.zeros(1, dtype=torch.int32),  # not in pinned memory
    }
    ops.normalize(**good)
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{name} (\[.*\] )?must be "):
        ops.normalize(**{**good, name: bad[name]})


@pytest.mark.parametrize("shape,kind", [*CASES, *(((32, 64, 112, 112), kind) for kind in ALL)])
def test_the_variance_keeps_its_digits_wherever_zeros_or_outliers_are(shape, kind):
    assert error_of_the_variance(ops.stats, kind, shape, "cuda") < 1e-6


def test_the_shift_survives_a_mean_of_1e5():
    check_stats(ops, Case((32, 4, 64, 64), mean=1e5), "cuda")
