"""The CPU kernels against `reference.py` in float64, over the edges of every loop.

Tolerances: a kernel computes in float32 (float64 for float64) and rounds once to the type of its output. So an element may be off
by half an ulp of that type, plus a few float32 roundings of the terms that it is made of; `close` writes that down once.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from support import op_cases
from syncbn import native, ops, reference
from syncbn.activation import Activation, keeps_mask
from syncbn.layout import samples_per_channel
from syncbn.moments import sums_numel

CPU = native.status()[0]
pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)]

SHAPES = [
    (3, 7, 5, 11),  # primes: nothing divides a vector
    (2, 3, 7, 7),  # planes of 3 vectors and a tail
    (1, 1, 1, 16),  # one vector exactly
    (2, 2, 97, 97),  # odd planes, one to a chunk
    (1, 6, 1, 33001),  # planes in several chunks, which start inside bytes of the mask
    (3, 5, 1, 33001),  # more values of a channel than a partial sum covers
    (40, 9, 13, 20),  # several planes in a chunk, and a channel left over by those that go side by side
    (2, 301, 5, 5),  # more channels than a group
    (5, 4, 2, 2),  # planes shorter than a vector
    (19, 88, 7, 7),  # short planes summed as columns: strips of channels, the last one short
    (8, 24, 9, 11),  # the same, with fewer planes to a strip
    (50, 8, 5, 5),  # the same, with some samples in a row, and a last, shorter row
    (9, 5, 5, 5),  # the same, but samples begin within bytes of the mask
    (9, 24, 4, 4),  # the same, whole vectors
    (6, 1, 3, 3),  # C = 1
    (16, 33),  # 2-D: C not a multiple of a vector
    (8, 300),  # 2-D: rows folded
    (40, 2500),  # 2-D: more channels than a strip
    (11, 2048),  # 2-D: wide rows abreast, and some alone
    (140, 2080),  # the same, with threads and runs that begin within a row
    (1, 5),  # fewer numbers than a vector
    (700, 3),  # rows folded, the last one short
    (2, 3, 4, 5, 6),  # 5-D
    (0, 4, 5, 5),  # an empty batch
    (3, 4, 0, 5),  # empty planes
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last"]
FUSIONS = [(activation, add) for activation in Activation for add in (False, True)]
SLOPE, EPS = 0.1, 1e-5
# csrc/cpu/traverse.h: outputs from this size on are written past the cache
STREAM_BYTES = 2 << 20

every_case = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def laid(t: Tensor, layout: str) -> Tensor:
    return t.contiguous() if layout == "contiguous" else t.movedim(1, -1).contiguous().movedim(-1, 1)


class Case:
    """Arguments of the four ops for one shape; `exact` gives the same in float64."""

    def __init__(self, shape, dtype, layout, seed=0):
        generator = torch.Generator().manual_seed(seed)
        random = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        draws = (2 * random(*shape) + 3, random(*shape), random(*shape))
        self.x, self.residual, self.dy = (laid(draw.to(dtype), layout) for draw in draws)
        self.weight, self.bias = random(shape[1]) + 0.5, random(shape[1])
        self.stats = reference.stats(self.x.double())


def exact(args):
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def close(got: Tensor, want: Tensor, terms: float, name: str = "") -> None:
    """Half an ulp of got's type, and 8 roundings in the type of computation of terms as large as `terms`."""
    assert got.shape == want.shape, name
    acc = torch.finfo(reference.acc_type(got.dtype)).eps
    tolerance = torch.finfo(got.dtype).eps / 2 * want.abs() * (got.dtype.itemsize == 2) + 8 * acc * terms
    tolerance = tolerance + (6e-8 if got.dtype == torch.float16 else 0)  # half of its smallest subnormal
    error = (got.double() - want).abs()
    assert (error <= tolerance).all(), f"{name}: off by {(error / tolerance).max():.2f} times the tolerance"


def normalize_args(case, activation, add, running=(None, None, None), momentum=0.1, unbiased=True):
    residual = case.residual if add else None
    return (case.x, case.stats, case.weight, case.bias, residual, *running, momentum, EPS, unbiased, activation, SLOPE)


def kept_mask(case, activation, add):
    mask = ops.normalize(*normalize_args(case, activation, add))[1]
    return mask if keeps_mask(activation, add) else None


def backward_args(case, activation, add, *, stats=None, sums=None):
    """Of backward_reduce; of backward_input where sums are given."""
    residual = case.residual if add else None
    stats = case.stats if stats is None else stats
    how = (case.weight, case.bias, residual, kept_mask(case, activation, add), EPS, activation, SLOPE)
    return (case.dy, case.x, stats, *([] if sums is None else [sums]), *how)


# ---- Each op equals its reference ------------------------------------------------------------------------------------------------


@every_layout
@every_dtype
@every_case
def test_stats(shape, dtype, layout):
    x = Case(shape, dtype, layout).x
    for rank_weighted, shifted in itertools.product((False, True), repeat=2):
        got, want = (f.stats(t, rank_weighted, shifted) for f, t in ((ops, x), (reference, x.double())))
        # The sums come from chunks of at most 1024 additions for each lane, as a tree, whose errors do not grow with mean / std.
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance * max(samples_per_channel(x), 1))
        assert got[: shape[1]].tolist() == want[: shape[1]].tolist() and got[3 * shape[1] :].tolist() == want[3 * shape[1] :].tolist()


@every_layout
@every_dtype
@every_case
def test_normalize(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    for activation, add in FUSIONS:
        args = normalize_args(case, activation, add)
        (y, mask), (want, want_mask) = ops.normalize(*args), reference.normalize(*exact(args))
        close(y, want, 10, f"{activation} {add}")
        assert y.stride() == case.x.stride() and mask.shape == want_mask.shape
        # A sign may differ only where z is within rounding of 0, which these seeds do not hit in float64. Both write idle bits as zeros.
        assert (mask != want_mask).sum() <= (0 if dtype == torch.float64 else 1)


@every_layout
@every_dtype
@every_case
def test_backward_reduce(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    n = max(samples_per_channel(case.x), 1)
    for activation, add in FUSIONS:
        args = backward_args(case, activation, add)
        got, want = ops.backward_reduce(*args), reference.backward_reduce(*exact(args))
        # n terms of size 1 in chunks of at most 1024 for each lane, as a tree: its roundings are far below n eps 8.
        assert got[0][2 * shape[1] :].tolist() == want[0][2 * shape[1] :].tolist() == [0, 0]
        assert ((got[0] - want[0]).abs() <= 8 * n * torch.finfo(reference.acc_type(dtype)).eps).all(), (activation, add)
        for gradient, parameter, part in ((got[1], case.weight, got[0][shape[1] : 2 * shape[1]]), (got[2], case.bias, got[0][: shape[1]])):
            assert gradient.dtype == parameter.dtype and torch.equal(gradient, part.to(parameter.dtype))


@every_layout
@every_dtype
@every_case
def test_backward_input(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    for activation, add in FUSIONS:
        sums = reference.backward_reduce(*exact(backward_args(case, activation, add)))[0]
        weighted = 3 * reference.stats(case.x.double(), True)
        for stats, rank_weighted in ((case.stats, False), (3 * case.stats, False), (weighted, True)):  # 1 rank, 3 equal ones, weighted
            args = (*backward_args(case, activation, add, stats=stats, sums=sums), rank_weighted)
            (dx, dz), (want, want_dz) = ops.backward_input(*args), reference.backward_input(*exact(args))
            invstd = reference.finalize(stats, EPS)[2]  # with a single sample, dz and its mean cancel, each scaled by 1 / sqrt(eps)
            close(dx, want, max(10, 4 * float(invstd.max())), f"{activation} {add}")
            close(dz, want_dz, 4, f"dz {activation} {add}")
            assert dx.stride() == case.x.stride() and (not dz.numel() or dz.stride() == case.x.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_many_rows(dtype, monkeypatch):
    """Blocks of rows for threads, each of more than a chunk of 512."""
    monkeypatch.setitem(globals(), "FUSIONS", [(Activation.none, False), (Activation.relu, True)])
    test_stats((8352, 512), dtype, "contiguous")
    test_backward_reduce((8352, 512), dtype, "contiguous")


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
@every_dtype
def test_a_narrower_instruction_set_equals_the_reference(isa, dtype):
    widest = native.cpu_isa(CPU.path)
    if widest == isa or native.cpu_isa(CPU.path, isa) != isa:
        pytest.skip(f"{isa} is what the other tests run, or is not here")
    try:
        for shape in [(3, 7, 5, 11), (2, 3, 7, 7), (9, 48, 7, 7), (5, 4, 2, 2), (1, 5), (9, 33), (300, 3)]:
            for layout in LAYOUTS:
                test_stats(shape, dtype, layout)
                test_normalize(shape, dtype, layout)
                test_backward_reduce(shape, dtype, layout)
                test_backward_input(shape, dtype, layout)
        for case in op_cases.TAGGED:
            for check in op_cases.CHECKS.values():
                check(ops, case)
    finally:
        native.cpu_isa(CPU.path, widest)


@every_layout
@every_dtype
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("shape", [(37, 901, 7, 7), (75001, 21), (5, 4, 283, 283)], ids=str)
def test_non_temporal_stores_equal_the_reference(shape, dtype, layout, isa, monkeypatch):
    """Outputs above the 2 MB threshold for non-temporal stores, with planes and rows that end inside a cache line; on several threads."""
    case = Case(shape, dtype, layout)
    assert case.x.nbytes > 3 << 20 > STREAM_BYTES
    widest = native.cpu_isa(CPU.path)
    if native.cpu_isa(CPU.path, isa) != isa:
        native.cpu_isa(CPU.path, widest)
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setitem(
        globals(),
        "FUSIONS",
        [(Activation.relu, True)] if isa == "baseline" else [(Activation.none, False), (Activation.relu, True), (Activation.silu, True)],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        test_normalize(shape, dtype, layout)
        test_backward_input(shape, dtype, layout)
    finally:
        torch.set_num_threads(before)
        native.cpu_isa(CPU.path, widest)


def test_the_kernels_run_and_not_the_reference():
    for name in ops.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"syncbn::{name}", "CPU")


# ---- Moving statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_statistics(momentum, unbiased, dtype):
    case = Case((4, 5, 3), torch.float32, "contiguous")
    got = (torch.ones(5, dtype=dtype), torch.ones(5, dtype=dtype), torch.tensor(3))
    want = (torch.ones(5).double(), torch.ones(5).double(), torch.tensor(3))
    for _ in range(2):
        ops.normalize(*normalize_args(case, Activation.none, False, got, momentum, unbiased))
        reference.normalize(*normalize_args(case, Activation.none, False, want, momentum, unbiased))
    # Rounded once a step: twice an ulp, and half precision goes through float32.
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.allclose(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert got[2] == want[2] == 5


def test_no_samples_anywhere_change_nothing():
    x, running = torch.empty(0, 2, 3), (torch.ones(2), torch.ones(2), torch.tensor(3))
    y, _ = ops.normalize(x, torch.zeros(10).double(), None, None, None, *running, None, EPS, True, Activation.none, 0.0)
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
    assert relative_variance_error(laid(noise + 1e4, layout)) < 1e-6  # raw float32 sums of squares: 25
    assert relative_variance_error(laid(noise * 1e-6, layout)) < 1e-6
    front = noise + 1e2
    front[(0, slice(None)) + (0,) * (len(shape) - 2)] = 1e4  # in each channel the first value, from which a shift could be taken
    assert relative_variance_error(laid(front, layout)) < 1e-6
    x = laid(noise + 1e4, layout)
    stats = ops.stats(x, False)
    y = ops.normalize(x, stats, None, None, None, None, None, None, 0.1, 0.0, True, Activation.none, 0.0)[0]
    want = reference.normalize(
        x.double(), reference.stats(x.double()), None, None, None, None, None, None, 0.1, 0.0, True, Activation.none, 0.0
    )[0]
    assert (y.double() - want).abs().max() < 2e-6


def test_variance_of_the_final_partial_chunk_is_accurate():
    """Long enough that the last few values, fewer than a vector, form their own chunk, on any instruction set."""
    noise = torch.randn(1, 5, 257 * 16384 + 3, generator=torch.Generator().manual_seed(1))
    assert relative_variance_error(noise + 1e5) < 3e-6


def dz_of(implementation, x, stats, residual, mask, *how):
    """The residual's gradient where dy is 1."""
    sums = torch.zeros(sums_numel(x.shape[1])).double()
    return implementation.backward_input(torch.ones_like(x), x, stats, sums, None, None, residual, mask, *how)[1]


def test_silu_of_very_negative_values_is_the_references():
    x = torch.tensor([[-1e2], [-1e36], [-3e38], [float("-inf")], [-20.0], [0.0], [88.0], [3e38]])
    args = (x, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]).double(), None, None, None)
    how = (0.0, Activation.silu, 0.0)
    y, want = (f.normalize(*args, None, None, None, 0.1, 0.0, True, *how[1:])[0] for f in (ops, reference))
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
    dz = ops.backward_input(torch.ones(shape), x, stats, sums, *how)[1]
    assert dz.tolist() == torch.ones(shape).tolist()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_relu_lets_nan_through_and_stops_minus_infinity():
    x = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    stats = torch.tensor([0.0, 0.0, 4.0, 4.0, 10.0, 10.0, 2.0, 2.0, 0.0, 0.0]).double()
    residual = torch.tensor([[float("-inf"), 0.0], [0.0, 0.0]])
    y, mask = ops.normalize(x, stats, None, None, residual, None, None, None, 0.1, EPS, True, Activation.relu, 0.0)
    assert y[0, 0] == 0 and y[1, 1].isnan()
    assert dz_of(ops, x, stats, residual, mask, EPS, Activation.relu, 0.0).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("case", op_cases.EXTREMES + op_cases.TAGGED, ids=str)
@pytest.mark.parametrize("op", op_cases.CHECKS)
def test_nan_infinities_and_far_means_end_as_in_the_reference(op, case):
    op_cases.CHECKS[op](ops, case)


# ---- Determinism, views, autograd's three gates -----------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("shape", [(8, 3, 128, 64), (8, 9, 128, 72), (20000, 6), (16, 200, 7, 7), (1100, 2080)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape, layout):
    def run():
        case = Case(shape, torch.float32, layout)
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


def test_a_view_with_a_storage_offset():
    case = Case((4, 3, 5, 7), torch.float32, "contiguous")
    view = torch.cat([torch.full((1, 3, 5, 7), 9e9), case.x])[1:]
    assert view.storage_offset() and torch.equal(ops.stats(view, False), ops.stats(case.x, False))


@pytest.mark.parametrize("activation,add", [(Activation.none, False), (Activation.leaky_relu, True), (Activation.silu, True)])
def test_opcheck(activation, add):
    case = Case((2, 3, 5, 7), torch.float32, "channels_last")
    running = (torch.zeros(3), torch.ones(3), torch.tensor(0))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.stats, (case.x, True), test_utils=tests)
    torch.library.opcheck(ops.normalize, normalize_args(case, activation, add, running), test_utils=tests)
    args = backward_args(case, activation, add)
    torch.library.opcheck(ops.backward_reduce, args, test_utils=tests)
    sums = ops.backward_reduce(*args)[0]
    torch.library.opcheck(ops.backward_input, backward_args(case, activation, add, sums=sums), test_utils=tests)
