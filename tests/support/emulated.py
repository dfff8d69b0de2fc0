"""The CUDA kernels as a shared library for the CPU, through tests/kernels/emulation: same names and arguments as in reference.py.

Every tensor is copied between margins of NaN, so that out-of-bounds reads corrupt the result and out-of-bounds writes are
detected. Outputs are NaN before the kernel runs.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from support import ROOT
from support.emulated_args import ARGS, Layout, Stats, Vector, Verification
from support.objects import compile_once
from support.ptx import translate
from syncbn.activation import keeps_mask, writes_dz
from syncbn.layout import mask_bytes, outer_c_inner
from syncbn.moments import stats_numel, sums_numel

KERNELS = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "kernels" / "emulation"
PTX = ROOT / "tests" / "kernels" / "ptx"
# Each op, and its tensors of x's shape.
OPS = {
    "stats": ("x",),
    "normalize": ("x", "residual", "y"),
    "backward_reduce": ("dy", "x", "residual"),
    "backward_input": ("dy", "x", "residual", "dx", "dz"),
}
COMPILER = shutil.which("g++")
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))
PLANS = ["-include", os.environ["SYNCBN_PLANS"]] if os.environ.get("SYNCBN_PLANS") else []  # other ones than csrc/cuda/plans.cuh has
MARGIN = 64  # bytes; keeps the alignment of what lies between

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

# ---- Building -----------------------------------------------------------------------------------------------------------------


def compile_kernel(source: Path, target: Path, *flags: str) -> None:
    """A source with kernels, by g++: it sees the headers next to it."""
    _compile(["-O1", "-fsanitize=alignment", "-I", str(EMULATION / "include"), *flags, "-x", "c++", str(source)], target)


def build(folder: Path, *flags: str, kernels: Path = KERNELS) -> Path:
    """The library of all four ops, from the sources in `kernels`, and of the kernel with faults."""
    for op in OPS:
        compile_kernel(kernels / f"{op}.cu", folder / f"{op}.o", *flags)
    _compile_emulation(folder, EMULATION / "library.cpp", EMULATION / "scheduler.cpp")
    return link(folder, {})


def build_from_ptx(folder: Path) -> Path:
    """The same library built from nvcc's output: nvcc's host code launches the translated PTX."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda op: _compile_ptx(op, folder), OPS))
    _compile_emulation(folder, EMULATION / "library.cpp", EMULATION / "scheduler.cpp", PTX / "cudart.cpp")
    return link(folder, {})


def _compile_ptx(op: str, folder: Path) -> None:
    # No machine code: ptxas has nothing to do. And the PTX is in the object, uncompressed, so that one file is all that is kept.
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90,code=compute_90", "--no-compress", *PLANS, "-Xcompiler", "-fPIC"]
    compile_once([NVCC, *flags, str(KERNELS / f"{op}.cu")], folder / f"{op}.o")
    (text,) = re.findall(rb"\.version [^\0]*", (folder / f"{op}.o").read_bytes())
    (folder / f"{op}.ptx").write_bytes(text)
    compile_translated(text.decode(), op, folder / f"{op}_ptx.o")


def compile_translated(text: str, op: str, target: Path, *flags: str) -> None:
    """The PTX of one op, as C++."""
    arguments = ["-O1", "-fwrapv", "-ffp-contract=off", *flags, "-I", str(EMULATION), "-I", str(PTX), "-x", "c++", "-"]
    _compile(arguments, target, translate(text, f"{op}.ptx"))


def build_sweep(op: str, target: Path) -> None:
    """benchmarks/sweep.cu for this op, as a program."""
    build_program(ROOT / "benchmarks" / "sweep.cu", target, f"-DSWEPT_OP={op}", "-include", str(EMULATION / "host_runtime.h"))


def build_program(source: Path, target: Path, *flags: str) -> None:
    """A source with a main(), which sees the kernels' headers."""
    folders = [flag for folder in (EMULATION / "include", EMULATION, KERNELS) for flag in ("-I", str(folder))]
    sources = [str(source), str(EMULATION / "scheduler.cpp")]
    _run([COMPILER, "-std=c++17", "-O0", "-w", "-U_FORTIFY_SOURCE", *flags, *folders, "-x", "c++", *sources, "-o", str(target)])


def build_peers(folder: Path) -> Path:
    """peer_all_reduce, with what Python calls of it, and tests/kernels/emulation/peers.cu."""
    compile_kernel(KERNELS / "peer_all_reduce.cu", folder / "peer_all_reduce.o")
    compile_kernel(KERNELS / "peer_all_reduce_exports.cpp", folder / "exports.o", "-include", str(EMULATION / "host_runtime.h"))
    compile_peers(KERNELS, folder / "peers.o")
    _compile_scheduled(EMULATION / "scheduler.cpp", folder)
    return link(folder, {})


def compile_peers(kernels: Path, target: Path, *flags: str) -> None:
    """tests/kernels/emulation/peers.cu with the headers in `kernels`."""
    compile_kernel(EMULATION / "peers.cu", target, "-U_FORTIFY_SOURCE", "-I", str(kernels), *flags)


def _compile_emulation(folder: Path, *sources: Path) -> None:
    compile_kernel(EMULATION / "faulty.cu", folder / "faulty.o")
    for source in sources:
        _compile_scheduled(source, folder)


def _compile_scheduled(source: Path, folder: Path) -> None:
    # Fibers longjmp between stacks, which _FORTIFY_SOURCE rejects.
    folders = [flag for path in (EMULATION, EMULATION / "include", KERNELS) for flag in ("-I", str(path))]
    _compile(["-O2", "-U_FORTIFY_SOURCE", *folders, str(source)], folder / f"{source.stem}.o")


def link(folder: Path, replaced: dict[str, Path]) -> Path:
    """The library of the objects in `folder`, some of them replaced."""
    # The replaced ones first: of an inline function that several objects define, the first is taken.
    objects = [*replaced.values(), *(path for path in sorted(folder.glob("*.o")) if path.stem not in replaced)]
    target = (next(iter(replaced.values())).parent if replaced else folder) / "libemulated.so"
    # It must call its own part of CUDA's runtime, not the real one that torch may have loaded; and nothing may be missing.
    _run([COMPILER, "-shared", "-Wl,-Bsymbolic,-z,defs", "-o", str(target), *map(str, objects)])
    return target


def _compile(arguments: list[str], target: Path, source: str = "") -> None:
    compile_once([COMPILER, "-std=c++17", "-fPIC", "-w", *PLANS, *arguments], target, source)


def _run(command: list) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- Calling ------------------------------------------------------------------------------------------------------------------


class Guarded:
    """Tensors between margins, for one call."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, int]] = []

    def new(self, like: Tensor, misaligned: bool = False) -> Tensor:
        """NaN of like's shape, strides and type, perhaps one element off the alignment."""
        span = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) if like.numel() else 1
        size = span * like.element_size()
        start = MARGIN + misaligned * like.element_size()
        raw = torch.full((size + 4 * MARGIN,), 0xFF, dtype=torch.uint8)
        start += -raw.data_ptr() % MARGIN
        storage = raw[start : start + size].view(torch.uint8)
        self.kept.append((raw, storage, start))
        flat = torch.frombuffer(memoryview(storage.numpy()), dtype=like.dtype)
        return flat.as_strided(like.shape, like.stride())

    def copy(self, t: Tensor | None, misaligned: bool = False) -> Tensor | None:
        return None if t is None else self.new(t, misaligned).copy_(t)

    def check(self) -> None:
        for raw, storage, start in self.kept:
            assert bool((raw[:start] == 0xFF).all()) and bool((raw[start + storage.numel() :] == 0xFF).all()), "written out of bounds"


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def vector(t: Tensor | None) -> ctypes.Structure:
    return Vector() if t is None else Vector(t.data_ptr(), DTYPES[t.dtype], t.stride(0))


def statistics(stats: Tensor, eps: float) -> ctypes.Structure:
    return Stats(stats.data_ptr(), eps)


def verification(tag: int, ranks: int, alarm: Tensor | None) -> ctypes.Structure:
    return Verification(ranks * tag, ranks * tag * tag, pointer(alarm))


@dataclass(frozen=True)
class Emulated:
    """The four ops; `sm_count` decides the grid, `seed` the order of blocks and threads; `misaligned` are names in OPS."""

    compiled: ctypes.CDLL
    sm_count: int = 2
    seed: int = 0
    misaligned: tuple[str, ...] = ()

    @staticmethod
    def load(path: Path) -> Emulated:
        library = ctypes.CDLL(str(path))
        for name in (*OPS, "fault"):
            getattr(library, f"emulate_{name}").restype = ctypes.c_char_p
        sizes = [*(ctypes.c_size_t * len(OPS)).in_dll(library, "emulated_sizes")]
        assert sizes == [ctypes.sizeof(ARGS[op]) for op in OPS], "the structs of csrc/args.h are not those of ARGS"
        return Emulated(library)

    def varied(self, op: str, case: object) -> Emulated:
        """Varies thread order and number of multiprocessors (1, 2 or 7: with more of them, more blocks share a channel's sums) with op
        and case; in one case in 4 all tensors of OPS are misaligned."""
        seed = zlib.crc32(repr((op, case)).encode())
        return replace(self, seed=seed, sm_count=(1, 2, 7)[seed % 3], misaligned=OPS[op] if seed // 3 % 4 == 3 else ())

    def _run(self, op: str, guarded: Guarded, like: Tensor, **arguments) -> None:
        args = ARGS[op](dtype=DTYPES[like.dtype], layout=Layout(*outer_c_inner(like)), **arguments)
        error = getattr(self.compiled, f"emulate_{op}")(ctypes.byref(args), self.sm_count, ctypes.c_uint64(self.seed))
        if error:
            raise RuntimeError(error.decode())
        guarded.check()

    def _copies(self, guarded: Guarded, **tensors: Tensor | None) -> list[Tensor | None]:
        return [guarded.copy(t, name in self.misaligned) for name, t in tensors.items()]

    def _new(self, guarded: Guarded, like: Tensor, name: str) -> Tensor:
        return guarded.new(like, name in self.misaligned)

    def fault(self, number: int) -> None:
        """The kernel with the faults of faulty.cu."""
        g = Guarded()
        error = self.compiled.emulate_fault(number, ctypes.c_void_p(g.new(torch.empty(4)).data_ptr()))
        if error:
            raise RuntimeError(error.decode())
        g.check()

    def stats(self, x: Tensor, rank_weighted: bool, shifted: bool = False, tag: int = 0) -> Tensor:
        g = Guarded()
        (x,) = self._copies(g, x=x)
        out = g.new(torch.empty(stats_numel(x.shape[1]), dtype=torch.float64))
        self._run("stats", g, x, x=pointer(x), rank_weighted=rank_weighted, shifted=shifted, tag=tag, stats=pointer(out))
        return out

    def normalize(
        self, x, stats, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, unbiased, eps, activation, slope,
        tag=0, ranks=0, alarm=None,
    ):  # fmt: skip
        g = Guarded()
        x, residual = self._copies(g, x=x, residual=residual)
        stats, weight, bias = g.copy(stats), g.copy(weight), g.copy(bias)
        updated = {"running_mean": running_mean, "running_var": running_var, "num_batches_tracked": num_batches_tracked, "alarm": alarm}
        inside = {name: g.copy(t) for name, t in updated.items()}
        keep_mask = keeps_mask(activation, residual is not None)
        y = self._new(g, x, "y")
        mask = g.new(torch.empty(mask_bytes(x) if keep_mask else 0, dtype=torch.uint8))
        self._run(
            "normalize", g, x, x=pointer(x), stats=statistics(stats, eps), weight=vector(weight), bias=vector(bias),
            residual=pointer(residual), running_mean=vector(inside["running_mean"]), running_var=vector(inside["running_var"]),
            num_batches_tracked=pointer(inside["num_batches_tracked"]), cumulative=momentum is None, momentum=momentum or 0.0,
            unbiased=unbiased, activation=activation, negative_slope=slope, y=pointer(y),
            mask=pointer(mask) if keep_mask else None, verification=verification(tag, ranks, inside["alarm"]),
        )  # fmt: skip
        for name, t in updated.items():
            if t is not None:
                t.copy_(inside[name])
        return y, mask

    def backward_reduce(self, dy, x, stats, weight, bias, residual, mask, eps, activation, slope, tag=0):
        g = Guarded()
        dy, x, residual = self._copies(g, dy=dy, x=x, residual=residual)
        stats, weight, bias, mask = (g.copy(t) for t in (stats, weight, bias, mask))
        sums = g.new(torch.empty(sums_numel(x.shape[1]), dtype=torch.float64))
        dweight, dbias = (None if t is None else g.new(t) for t in (weight, bias))
        self._run(
            "backward_reduce", g, x, dy=pointer(dy), x=pointer(x), stats=statistics(stats, eps), weight=vector(weight), bias=vector(bias),
            residual=pointer(residual), mask=pointer(mask), activation=activation, negative_slope=slope,
            tag=tag, sums=pointer(sums), dweight=vector(dweight), dbias=vector(dbias),
        )  # fmt: skip
        return sums, *(x.new_empty(0) if t is None else t for t in (dweight, dbias))

    def backward_input(
        self, dy, sums, x, stats, weight, bias, residual, mask, eps, activation, slope, rank_weighted=False, tag=0, ranks=0, alarm=None
    ):
        g = Guarded()
        dy, x, residual = self._copies(g, dy=dy, x=x, residual=residual)
        stats, sums, weight, bias, mask = (g.copy(t) for t in (stats, sums, weight, bias, mask))
        with_dz, inside = writes_dz(activation, residual, mask), g.copy(alarm)
        dx, dz = self._new(g, x, "dx"), self._new(g, x, "dz") if with_dz else x.new_empty(0)
        self._run(
            "backward_input", g, x, dy=pointer(dy), x=pointer(x), stats=statistics(stats, eps), sums=pointer(sums),
            weight=vector(weight), bias=vector(bias), residual=pointer(residual), mask=pointer(mask),
            activation=activation, negative_slope=slope, rank_weighted=rank_weighted,
            dx=pointer(dx), dz=pointer(dz) if with_dz else None, verification=verification(tag, ranks, inside),
        )  # fmt: skip
        if alarm is not None:
            alarm.copy_(inside)
        return dx, dz
