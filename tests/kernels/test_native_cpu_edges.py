"""The CPU kernels where a naive method fails: accuracy, masks, infinities, no samples; results for any number of threads; fake kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from support.cpu_cases import EPS, CpuCase, backward_args, normalize_args
from support.layouts import channels_last, contiguous, every_layout
from support.op_cases import EXTREMES, FAR, TAGGED
from support.op_checks import CHECKS
from syncbn import native, ops, reference
from syncbn.activation import Activation
from syncbn.moments import sums_numel

CPU = native.status()[0]
pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)]


def test_no_samples_anywhere_change_nothing():
    x, running = torch.empty(0, 2, 3), (torch.ones(2), torch.ones(2), torch.tensor(3))
    y, _ = ops.normalize(x, torch.zeros(10).double(), None, None, None, *running, None, True, EPS, Activation.none, 0.0)
    assert y.shape == x.shape and [r.tolist() for r in running] == [[1, 1], [1, 1], 3]


# ---- Accuracy where a naive method fails ------------------------------------------------------------------------------------------


def relative_variance_error(x: Tensor) -> float:
    _, var, _ = reference.finalize(ops.stats(x, False), 0.0)
    exact_var = x.double().movedim(1, 0).flatten(1).var(1, correction=0)
    return float(((var - exact_var) / exact_var).abs().max())


@every_layout
@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (4000, 5), (64, 40, 7, 7), (4, 40, 7, 7)], ids=str)
def test_variance_survives_mean_and_outliers(shape, layout):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert relative_variance_error(layout(noise + 1e4)) < 1e-6  # of raw float32 sums of squares it is 25
    assert relative_variance_error(layout(noise * 1e-6)) < 1e-6
    front = noise + 1e2
    front[(0, slice(None)) + (0,) * (len(shape) - 2)] = 1e4  # in each channel the first value, from which a shift could be taken
    assert relative_variance_error(layout(front)) < 1e-6
    x = layout(noise + 1e4)
    stats = ops.stats(x, False)
    y = ops.normalize(x, stats, None, None, None, None, None, None, 0.1, True, 0.0, Activation.none, 0.0)[0]
    want = reference.normalize(
        x.double(), reference.stats(x.double(), False), None, None, None, None, None, None, 0.1, True, 0.0, Activation.none, 0.0
    )[0]
    assert (y.double() - want).abs().max() < 2e-6


def test_variance_of_the_final_partial_chunk_is_accurate():
    """Long enough that the last few values, fewer than a vector, form their own chunk, on any instruction set."""
    noise = torch.randn(1, 5, 257 * 16384 + 3, generator=torch.Generator().manual_seed(1))
    assert relative_variance_error(noise + 1e5) < 3e-6


def dz_of(implementation, x, stats, residual, mask, *how):
    """The residual's gradient if dy is 1."""
    sums = torch.zeros(sums_numel(x.shape[1])).double()
    return implementation.backward_input(torch.ones_like(x), sums, x, stats, None, None, residual, mask, *how)[1]


def test_silu_of_very_negative_values_is_the_references():
    x = torch.tensor([[-1e2], [-1e36], [-3e38], [float("-inf")], [-20.0], [0.0], [88.0], [3e38]])
    args = (x, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]).double(), None, None, None)
    how = (0.0, Activation.silu, 0.0)
    y, want = (f.normalize(*args, None, None, None, 0.1, True, 0.0, *how[1:])[0] for f in (ops, reference))
    assert torch.allclose(y, want, rtol=1e-6, atol=1e-30, equal_nan=True)
    dz, want = (dz_of(f, x, args[1], torch.zeros_like(x), None, *how) for f in (ops, reference))
    assert torch.allclose(dz, want, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_mask_is_never_read_out_of_bounds():
    """The masks end where a page does, before one that cannot be read."""
    code = """
import ctypes, mmap, torch
from syncbn import layout, moments, ops
from syncbn.activation import Activation
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
planes = [(1, 1, 2), (1, 1, 8), (1, 1, 16), (1, 2, 24), (1, 1, 32), (3, 2, 17), (8, 8, 17), (8, 1, 24), (1, 2, 3, 3)]
for shape in [*planes, (2, 3), (2, 16), (2, 33)]:
    x = torch.randn(shape)
    n = layout.mask_bytes(x)
    mask = torch.frombuffer(memory, dtype=torch.uint8, count=n, offset=page - n)
    mask.fill_(255)
    stats = torch.ones(moments.stats_numel(shape[1])).double()
    how = (None, None, x, mask, 1e-5, Activation.relu, 0.0)
    sums = ops.backward_reduce(torch.ones(shape), x, stats, *how)[0]
    assert sums[: shape[1]].tolist() == [x.numel() // shape[1]] * shape[1]
    dz = ops.backward_input(torch.ones(shape), sums, x, stats, *how)[1]
    assert dz.tolist() == torch.ones(shape).tolist()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_relu_lets_nan_through_and_stops_minus_infinity():
    x = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    stats = torch.tensor([0.0, 0.0, 4.0, 4.0, 10.0, 10.0, 2.0, 2.0, 0.0, 0.0]).double()
    residual = torch.tensor([[float("-inf"), 0.0], [0.0, 0.0]])
    y, mask = ops.normalize(x, stats, None, None, residual, None, None, None, 0.1, True, EPS, Activation.relu, 0.0)
    assert y[0, 0] == 0 and y[1, 1].isnan()
    assert dz_of(ops, x, stats, residual, mask, EPS, Activation.relu, 0.0).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("case", EXTREMES + FAR + TAGGED, ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_nan_infinities_and_far_means_end_as_in_the_reference(op, case):
    CHECKS[op](ops, case)


# ---- Determinism, views, schemas and fake kernels ----------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("shape", [(8, 3, 128, 64), (8, 9, 128, 72), (20000, 6), (16, 200, 7, 7), (1100, 2080)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape, layout):
    def run():
        case = CpuCase(shape, torch.float32, layout)
        y, mask = ops.normalize(*normalize_args(case, Activation.relu, True))
        sums = ops.backward_reduce(*backward_args(case, Activation.relu, True))[0]
        return ops.stats(case.x, False), y, mask, sums, *ops.backward_input(*backward_args(case, Activation.relu, True, sums=sums))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(4)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_a_view_with_a_storage_offset_reads_its_own_elements():
    case = CpuCase((4, 3, 5, 7), torch.float32, contiguous)
    view = torch.cat([torch.full((1, 3, 5, 7), 9e9), case.x])[1:]
    assert view.storage_offset() and torch.equal(ops.stats(view, False), ops.stats(case.x, False))


@pytest.mark.parametrize("activation,add", [(Activation.none, False), (Activation.leaky_relu, True), (Activation.silu, True)])
def test_opcheck_passes(activation, add):
    case = CpuCase((2, 3, 5, 7), torch.float32, channels_last)
    running = (torch.zeros(3), torch.ones(3), torch.tensor(0))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.stats, (case.x, True), test_utils=tests)
    torch.library.opcheck(ops.normalize, normalize_args(case, activation, add, running), test_utils=tests)
    args = backward_args(case, activation, add)
    torch.library.opcheck(ops.backward_reduce, args, test_utils=tests)
    sums = ops.backward_reduce(*args)[0]
    torch.library.opcheck(ops.backward_input, backward_args(case, activation, add, sums=sums), test_utils=tests)
