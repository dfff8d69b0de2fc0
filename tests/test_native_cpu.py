"""The CPU kernels against `reference.py` in float64, over the edges of every loop, and what the binding refuses.

Tolerances: a kernel computes in float32 (float64 for float64) and rounds once to the type of its output. So an element may be off
by half an ulp of that type, plus a few float32 roundings of the terms that it is made of; `close` writes that down once.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import torch
from torch import Tensor

from syncbn import native, ops, reference

CPU = native.load()[0]
pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)]

SHAPES = [
    (3, 7, 5, 11),  # primes: nothing divides a vector
    (2, 3, 7, 7),  # planes of 3 vectors and a tail
    (1, 1, 1, 16),  # one vector exactly
    (2, 2, 97, 97),  # odd planes, one to a chunk
    (1, 2, 1, 33001),  # a plane in several chunks, which start inside bytes of the mask
    (3, 1, 1, 33001),  # more values of a channel than a partial sum covers
    (40, 2, 13, 20),  # several planes in a chunk
    (2, 300, 5, 5),  # more channels than a group
    (5, 4, 2, 2),  # planes shorter than a vector
    (6, 1, 3, 3),  # C = 1
    (16, 33),  # 2-D: C not a multiple of a vector
    (8, 300),  # 2-D: rows folded to more than a strip
    (40, 1500),  # 2-D: more channels than a strip
    (1, 5),  # fewer numbers than a vector
    (700, 3),  # rows folded, the last one short; several chunks of rows
    (2, 3, 4, 5, 6),  # 5-D
    (0, 4, 5, 5),  # an empty batch
    (3, 4, 0, 5),  # empty planes
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last"]
FUSIONS = [(activation, add) for activation in reference.ACTIVATIONS for add in (False, True)]
SLOPE, EPS = 0.1, 1e-5

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
    return mask if add and activation in ("relu", "leaky_relu") else None


def reduce_args(case, activation, add):
    residual = case.residual if add else None
    mask = kept_mask(case, activation, add)
    return (case.dy, case.x, case.stats, case.weight, case.bias, residual, mask, EPS, activation, SLOPE)


# ---- Each op equals its reference ------------------------------------------------------------------------------------------------


@every_layout
@every_dtype
@every_case
def test_stats(shape, dtype, layout):
    x = Case(shape, dtype, layout).x
    for rank_weighted in (False, True):
        got, want = ops.stats(x, rank_weighted), reference.stats(x.double(), rank_weighted)
        # The sums come from chunks of 256 additions for each lane, whose errors do not grow with mean / std.
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance * max(reference.samples_per_channel(x), 1))
        assert got[2 * shape[1] :].tolist() == want[2 * shape[1] :].tolist()


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
        # A sign may differ only where z is within rounding of 0, which these seeds do not hit in float64.
        assert (mask != want_mask).sum() <= (0 if dtype == torch.float64 else 1)


@every_layout
@every_dtype
@every_case
def test_backward_reduce(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    n = max(reference.samples_per_channel(case.x), 1)
    for activation, add in FUSIONS:
        args = reduce_args(case, activation, add)
        got, want = ops.backward_reduce(*args), reference.backward_reduce(*exact(args))
        # n terms of size 1 in chains of 256: 256 float32 roundings of the running sum are far below n eps 8.
        assert ((got[0] - want[0]).abs() <= 8 * n * torch.finfo(reference.acc_type(dtype)).eps).all(), (activation, add)
        close(got[1], want[1], 4, f"dz {activation} {add}")
        for gradient, parameter, part in ((got[2], case.weight, got[0][shape[1] :]), (got[3], case.bias, got[0][: shape[1]])):
            assert gradient.dtype == parameter.dtype and torch.equal(gradient, part.to(parameter.dtype))


@every_layout
@every_dtype
@every_case
def test_backward_input(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    for activation in reference.ACTIVATIONS:
        sums = reference.backward_reduce(*exact(reduce_args(case, activation, False)))[0]
        for stats in (case.stats, 3 * case.stats, 3 * reference.stats(case.x.double(), True)):  # 1 rank, 3 equal ones, weighted
            args = (case.dy, case.x, stats, sums, case.weight, case.bias, EPS, activation, SLOPE)
            dx, want = ops.backward_input(*args), reference.backward_input(*exact(args))
            invstd = reference.finalize(stats, EPS)[2]  # with a single sample, dz and its mean cancel, each scaled by 1 / sqrt(eps)
            close(dx, want, max(10, 4 * float(invstd.max())), activation)
            assert dx.stride() == case.x.stride()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
@every_dtype
def test_a_narrower_instruction_set_equals_the_reference(isa, dtype):
    widest = native.cpu_isa(CPU.path)
    if widest == isa or native.cpu_isa(CPU.path, isa) != isa:
        pytest.skip(f"{isa} is what the other tests run, or is not here")
    try:
        for shape in [(3, 7, 5, 11), (2, 3, 7, 7), (5, 4, 2, 2), (1, 5), (9, 33), (300, 3)]:
            for layout in LAYOUTS:
                test_stats(shape, dtype, layout)
                test_normalize(shape, dtype, layout)
                test_backward_reduce(shape, dtype, layout)
                test_backward_input(shape, dtype, layout)
    finally:
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
        ops.normalize(*normalize_args(case, "none", False, got, momentum, unbiased))
        reference.normalize(*normalize_args(case, "none", False, want, momentum, unbiased))
    # Rounded once a step: twice an ulp, and half precision goes through float32.
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.allclose(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert got[2] == want[2] == 5


def test_no_samples_anywhere_change_nothing():
    x, running = torch.empty(0, 2, 3), (torch.ones(2), torch.ones(2), torch.tensor(3))
    y, _ = ops.normalize(x, torch.zeros(5).double(), None, None, None, *running, None, EPS, True, "none", 0.0)
    assert y.shape == x.shape and [r.tolist() for r in running] == [[1, 1], [1, 1], 3]


# ---- Accuracy where a naive method fails ------------------------------------------------------------------------------------------


def relative_variance_error(x: Tensor) -> float:
    _, var, _ = reference.finalize(ops.stats(x, False), 0.0)
    exact_var = x.double().movedim(1, 0).flatten(1).var(1, correction=0)
    return float(((var - exact_var) / exact_var).abs().max())


@every_layout
@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (4000, 5), (64, 40, 7, 7)], ids=str)
def test_variance_survives_mean_and_outliers(shape, layout):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert relative_variance_error(laid(noise + 1e4, layout)) < 1e-6  # raw float32 sums of squares: 25
    assert relative_variance_error(laid(noise * 1e-6, layout)) < 1e-6
    front = noise + 1e2
    front[(0, slice(None)) + (0,) * (len(shape) - 2)] = 1e4  # in each channel the first value, from which a shift could be taken
    assert relative_variance_error(laid(front, layout)) < 1e-6
    x = laid(noise + 1e4, layout)
    stats = ops.stats(x, False)
    y = ops.normalize(x, stats, None, None, None, None, None, None, 0.1, 0.0, True, "none", 0.0)[0]
    want = reference.normalize(x.double(), reference.stats(x.double()), None, None, None, None, None, None, 0.1, 0.0, True, "none", 0.0)[0]
    assert (y.double() - want).abs().max() < 2e-6


def test_the_short_end_of_a_long_plane_keeps_its_digits_too():
    """So long that the end, fewer values than a vector, is a chunk of its own, on any instruction set."""
    noise = torch.randn(1, 1, 257 * 16384 + 3, generator=torch.Generator().manual_seed(1))
    assert relative_variance_error(noise + 1e5) < 3e-6


def test_silu_of_very_negative_values_is_the_references():
    x = torch.tensor([[-1e2], [-1e36], [-3e38], [float("-inf")], [-20.0], [0.0], [88.0], [3e38]])
    args = (x, torch.tensor([0.0, 1.0, 1.0]).double(), None, None, None)
    how = (0.0, "silu", 0.0)
    y, want = (f.normalize(*args, None, None, None, 0.1, 0.0, True, *how[1:])[0] for f in (ops, reference))
    assert torch.allclose(y, want, rtol=1e-6, atol=1e-30, equal_nan=True)
    dz, want = (f.backward_reduce(torch.ones_like(x), *args, torch.empty(0, dtype=torch.uint8), *how)[1] for f in (ops, reference))
    assert torch.allclose(dz, want, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_no_byte_behind_the_mask_is_read():
    """The masks end where a page does, before one that cannot be read."""
    code = """
import ctypes, mmap, torch
from syncbn import layout, ops
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
for shape in [(1, 1, 2), (2, 3), (1, 1, 8), (3, 2, 17), (2, 33), (1, 2, 3, 3)]:
    x = torch.randn(shape)
    n = layout.mask_bytes(x)
    mask = torch.frombuffer(memory, dtype=torch.uint8, count=n, offset=page - n)
    mask.fill_(255)
    stats = torch.ones(2 * shape[1] + 1).double()
    dz = ops.backward_reduce(torch.ones(shape), x, stats, None, None, x, mask, 1e-5, "relu", 0.0)[1]
    assert dz.tolist() == torch.ones(shape).tolist()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_relu_lets_nan_through_and_stops_minus_infinity():
    x = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    stats = torch.tensor([4.0, 4.0, 10.0, 10.0, 2.0]).double()
    residual = torch.tensor([[float("-inf"), 0.0], [0.0, 0.0]])
    y, mask = ops.normalize(x, stats, None, None, residual, None, None, None, 0.1, EPS, True, "relu", 0.0)
    assert y[0, 0] == 0 and y[1, 1].isnan()
    dz = ops.backward_reduce(torch.ones_like(x), x, stats, None, None, residual, mask, EPS, "relu", 0.0)[1]
    assert dz.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("case", op_cases.EXTREMES, ids=str)
@pytest.mark.parametrize("op", op_cases.CHECKS)
def test_nan_infinities_and_far_means_end_as_in_the_reference(op, case):
    op_cases.CHECKS[op](ops, case)


# ---- Determinism, views, autograd's three gates -----------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("shape", [(8, 3, 128, 64), (20000, 6), (16, 200, 7, 7)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape, layout):
    def run():
        case = Case(shape, torch.float32, layout)
        y, mask = ops.normalize(*normalize_args(case, "relu", True))
        sums, dz, *_ = ops.backward_reduce(*reduce_args(case, "relu", True))
        return ops.stats(case.x, False), y, mask, sums, dz

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


@pytest.mark.parametrize("activation,add", [("none", False), ("leaky_relu", True), ("silu", True)])
def test_opcheck(activation, add):
    case = Case((2, 3, 5, 7), torch.float32, "channels_last")
    running = (torch.zeros(3), torch.ones(3), torch.tensor(0))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.stats, (case.x, True), test_utils=tests)
    torch.library.opcheck(ops.normalize, normalize_args(case, activation, add, running), test_utils=tests)
    args = reduce_args(case, activation, add)
    torch.library.opcheck(ops.backward_reduce, args, test_utils=tests)
    sums = ops.backward_reduce(*args)[0]
    args = (case.dy, case.x, case.stats, sums, case.weight, None, EPS, activation, SLOPE)
    torch.library.opcheck(ops.backward_input, args, test_utils=tests)


# ---- What the binding refuses: the argument's name and what came -------------------------------------------------------------------

X, STATS, W = torch.ones(2, 3, 4), torch.ones(7).double(), torch.ones(3)


def normalize(x=X, stats=STATS, weight=W, bias=W, residual=None, mean=None, var=None, tracked=None, activation="none"):
    return ops.normalize(x, stats, weight, bias, residual, mean, var, tracked, 0.1, EPS, True, activation, 0.0)


def reduce(dy=X, x=X, residual=None, mask=None, activation="relu"):
    return ops.backward_reduce(dy, x, STATS, W, W, residual, mask, EPS, activation, 0.0)


REFUSED = [
    (lambda: ops.stats(torch.ones(3), False), r"x must be \[N, C, \*\] with 0 < C < 2\^31, got \[3\]"),
    (lambda: ops.stats(torch.ones(3, 0), False), r"x must be .* got \[3, 0\]"),
    (lambda: ops.stats(torch.ones(2, 3).long(), False), "x must be float32, .* got Long"),
    (lambda: ops.stats(torch.ones(2, 4, 6)[:, :, ::2], False), r"x \[2, 4, 3\] must be contiguous or .* strides \[24, 6, 2\]"),
    (lambda: ops.stats(torch.ones(2, 3, 4, 5).permute(0, 1, 3, 2), False), "x .* must be contiguous or channels-last"),
    (lambda: normalize(stats=STATS.float()), r"stats must be contiguous Double \[7\] or one more, got Float"),
    (lambda: normalize(stats=STATS[:6]), r"stats must .* got Double \[6\]"),
    (lambda: normalize(weight=torch.ones(4)), r"weight must be contiguous \[3\] to match x \[2, 3, 4\], got \[4\]"),
    (lambda: normalize(bias=torch.ones(6)[::2]), r"bias must be contiguous \[3\] .* strides \[2\]"),
    (lambda: normalize(bias=torch.ones(3).int()), "bias must be float32, .* got Int"),
    (lambda: normalize(mean=torch.ones(2)), r"running_mean must be .* got \[2\]"),
    (lambda: normalize(var=torch.ones(1, 3)), r"running_var must be .* got \[1, 3\]"),
    (lambda: normalize(tracked=torch.tensor(0.0)), "num_batches_tracked must be contiguous Long"),
    (lambda: normalize(residual=torch.ones(2, 3, 5)), r"residual must be \[2, 3, 4\], as x, got \[2, 3, 5\]"),
    (lambda: normalize(residual=X.half()), "residual must be Float, as x, got Half"),
    (lambda: normalize(residual=laid(X, "channels_last")), r"residual must lie in memory as x with strides \[12, 4, 1\], got strides"),
    (lambda: normalize(activation="gelu"), "activation must be none, relu, leaky_relu or silu, got 'gelu'"),
    (lambda: reduce(dy=torch.ones(2, 3)), r"dy must be \[2, 3, 4\], as x, got \[2, 3\]"),
    (lambda: reduce(residual=X), "mask must be given with a residual and relu"),
    (lambda: reduce(residual=X, mask=torch.zeros(3, dtype=torch.uint8)), r"mask must be contiguous Byte \[9\], got Byte \[3\]"),
    (lambda: ops.backward_input(X, X, STATS, STATS, W, W, EPS, "none", 0.0), r"sums must be contiguous Double \[6\], got Double \[7\]"),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=[message for _, message in REFUSED])
def test_the_binding_refuses(call, message):
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=message):
        call()


# ---- The libraries and their loading ------------------------------------------------------------------------------------------------


def test_a_missing_library_says_what_to_do_and_warns_once(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_gpu_capabilities", lambda: ())
    with pytest.warns(native.FallbackWarning, match="reference on cpu: libsyncbn_cpu.so was not built; .* reinstall") as warned:
        cpu, _ = native.load.__wrapped__()
    assert not cpu.loaded and len(warned) == 1


def test_a_library_that_cannot_be_loaded_is_refused(monkeypatch, tmp_path):
    (tmp_path / "libsyncbn_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_gpu_capabilities", lambda: ())
    with pytest.warns(native.FallbackWarning, match="was built for another torch"):
        assert not native.load.__wrapped__()[0].loaded


def test_the_environment_turns_the_libraries_off_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setenv("SYNCBN_NATIVE", "0")
    assert [library.loaded for library in native.load.__wrapped__()] == [False, False] and not recwarn.list


@pytest.mark.parametrize("capability,refused", [(75, True), (80, False), (86, False), (90, True), (120, False), (130, False)])
def test_a_cuda_library_without_code_for_the_gpu_is_refused(monkeypatch, tmp_path, capability, refused):
    (tmp_path / "libsyncbn_cuda.so").write_bytes(b"\0 syncbn-cuda-archs=80 100 120+PTX; \0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_gpu_capabilities", lambda: (capability,))
    reason = native._why_not_cuda(tmp_path / "libsyncbn_cuda.so")
    assert (f"this GPU is sm_{capability}: set TORCH_CUDA_ARCH_LIST" in reason) == refused, reason


def test_the_library_exports_nothing_but_its_switch():
    assert ctypes.CDLL(str(CPU.path)).syncbn_cpu_isa
    assert not hasattr(ctypes.CDLL(str(CPU.path)), "_ZN6syncbn3cpu7kernelsEv")


def test_no_code_for_wide_vectors_can_be_linked_where_narrow_code_is_meant(tmp_path):
    """A weak symbol of two instruction sets would be merged, and a CPU without AVX-512 could get the wrong one."""
    sources = Path(__file__).parent.parent / "csrc/cpu"
    if not (shutil.which("g++") and shutil.which("nm") and sources.exists() and CPU.reason == "uses avx512"):
        pytest.skip("needs g++, nm and the sources")
    flags = ["-std=c++17", "-O2", "-march=x86-64-v4", "-mavx512bf16", "-DSYNCBN_ISA=avx512", "-c", "-o", str(tmp_path / "stats.o")]
    subprocess.run(["g++", *flags, str(sources / "stats.cpp")], check=True)
    symbols = subprocess.run(["nm", "-C", str(tmp_path / "stats.o")], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line[17:18] in "WVu" and "syncbn::cpu::avx512" not in line and "DW.ref" not in line]
    assert not shared, shared
