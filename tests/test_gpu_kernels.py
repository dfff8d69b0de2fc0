"""The compiled CUDA kernels on a GPU: the table of the emulation, and what an emulation cannot show."""

from __future__ import annotations

import pytest
import torch
from op_cases import CHECKS, EPS, SLOPE, Case, check_stats, make, table

from syncbn import native, ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.world_size(1)]

SOME = [Case((40, 256), dtype=torch.bfloat16, activation="relu", residual=True), Case((8, 24, 31, 31), activation="silu", momentum=None)]


@pytest.fixture(autouse=True)
def native_kernels():
    cuda = next(library for library in native.status() if library.device == "cuda")
    if not cuda.loaded:
        pytest.skip(cuda.reason)


def step(case: Case):
    """All four ops once, each with the outputs of the one before: tensors that a repetition must equal bit by bit."""
    d = make(case, "cuda")
    stats = ops.stats(d.x, case.rank_weighted)
    state = (d.running_mean, d.running_var, d.tracked)
    y, mask = ops.normalize(d.x, stats, d.weight, d.bias, d.residual, *state, case.momentum, EPS, case.unbiased, case.activation, SLOPE)
    residual = d.residual if case.activation == "silu" else None
    how = (d.weight, d.bias, residual, mask if case.keeps_mask else None, EPS, case.activation, SLOPE)
    sums, dweight, dbias = ops.backward_reduce(d.dy, d.x, stats, *how)
    dx, dz = ops.backward_input(d.dy, d.x, stats, sums, *how)
    return [stats, y, sums, dweight, dbias, dx, dz, *(t for t in state if t is not None)]


@pytest.mark.parametrize("case", table(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_equals_the_reference(op, case):
    CHECKS[op](ops, case, "cuda")


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_view_off_the_alignment_gives_the_same(case):
    x = make(case, "cuda").x
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
    got, want = ops.stats(shifted, False), reference.stats(x.double())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-4)  # float32 sums of a few thousand values about 1


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_repetition_gives_the_same_bits(case):
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


def test_a_graph_replays_on_any_stream_with_the_same_bits():
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
        ops.normalize(x, stats, None, None, None, None, None, None, 0.1, EPS, True, "relu", SLOPE)
        sums, *_ = ops.backward_reduce(x, x, stats, None, None, None, None, EPS, "relu", SLOPE)
        ops.backward_input(x, x, stats, sums, None, None, None, None, EPS, "relu", SLOPE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_output_that_finds_no_memory_says_what_batch_size_finders_look_for():
    x = torch.zeros(8, 64, 256, 256, device="cuda")
    stats = ops.stats(x, False)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(RuntimeError, match=r"CUDA out of memory. syncbn could not allocate a tensor \[8, 64, 256, 256\]"):
            ops.normalize(x, stats, None, None, None, None, None, None, 0.1, EPS, True, "none", SLOPE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_elements(channels_last):
    shape = (2, 8, 2**27 + 9)  # 2^31 + 144
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of GPU memory")
    zeros = lambda *sizes: torch.zeros(sizes, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    x = zeros(shape[0], shape[2], shape[1]).movedim(-1, 1) if channels_last else zeros(*shape)
    x[-1, -1, -1] = 3.0  # the very last element
    stats = ops.stats(x, False)
    assert stats[7] == 3 and stats[15] == 9 and stats[:7].count_nonzero() == 0 and stats[16] == 2 * shape[2]
    # mean 0 and var 1 for all channels
    stats = torch.tensor([0.0] * 8 + [1.0] * 8 + [1.0], dtype=torch.float64, device="cuda")
    y, _ = ops.normalize(x, stats, None, None, None, None, None, None, 0.1, 0.0, True, "none", SLOPE)
    assert y[-1, -1, -1] == 3 and y.count_nonzero() == 1


def test_an_argument_that_no_kernel_takes_is_named():
    x = torch.randn(4, 6, 5, 5, device="cuda")
    stats = ops.stats(x, False)
    good = dict(
        x=x, stats=stats, weight=None, bias=None, residual=None, running_mean=None, running_var=None, num_batches_tracked=None,
        momentum=0.1, eps=EPS, unbiased=True, activation="none", negative_slope=SLOPE,
    )  # fmt: skip
    for name, value in {
        "x": x[:, :, ::2],
        "stats": stats[:-1],
        "weight": torch.ones(5, device="cuda"),
        "bias": torch.ones(6),
        "residual": x.bfloat16(),
        "running_mean": torch.ones(12, device="cuda")[::2],
        "num_batches_tracked": torch.tensor(0, device="cuda", dtype=torch.int32),
        "activation": "gelu",
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=name):
            ops.normalize(**{**good, name: value})


def test_the_shift_survives_a_mean_of_1e5():
    check_stats(ops, Case((32, 4, 64, 64), mean=1e5), "cuda")
