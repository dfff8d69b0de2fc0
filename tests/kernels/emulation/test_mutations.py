"""Mutation tests: a deleted barrier, or a changed index or term, must make a comparison fail.

Each mutant is compiled for the one op that is checked, and runs in a child process, because it may crash or run forever.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support import emulated
from support.mutants import run_all_checks, sources_for

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")]


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    op: str
    nth: int = 0  # occurrence of `old`
    dtype: str = "float32"  # compiled for this type of x alone, and run on the cases of that type

    def __str__(self) -> str:
        return re.sub(r"[^\w+*/%<=,.-]+", "_", f"{self.op}:{self.file}:{self.old}->{self.new}:{self.nth}")


USERS = {"reduce.cuh": ["stats", "backward_reduce"]}  # the ops that reach a header's barriers


def deleted_barriers() -> list[Mutant]:
    """Every __syncthreads() in the sources, for every op that reaches it."""
    found = []
    for path in sorted(emulated.KERNELS.glob("*.cu*")):
        ops = [path.stem] if path.suffix == ".cu" else USERS.get(path.name, [])
        count = path.read_text().count("__syncthreads();")
        assert ops or not count, f"add {path.name} to USERS"
        found += [Mutant(path.name, "__syncthreads();", "", op, nth) for nth in range(count) for op in ops]
    return found


def overlooked_tensors() -> list[Mutant]:
    """Each tensor in turn left out of the check whether all are aligned for vectors."""
    braces = lambda names: "{" + ", ".join(f"args.{name}" for name in names) + "}"  # noqa: E731
    return [
        Mutant(f"{op}.cu", braces(names), braces([other for other in names if other != name]), op)
        for op, names in emulated.OPS.items()
        for name in names
    ]


CHANGED = [
    # Indices and bounds
    Mutant("walk.cuh", "block % config.groups", "block / config.splits", "normalize"),
    Mutant("walk.cuh", "o * layout.C + group", "group * layout.outer + o", "normalize"),
    Mutant("walk.cuh", "(plane + 7) / 8 * 8", "plane / 8 * 8", "normalize"),
    Mutant("walk.cuh", "edge >= -run.head", "edge > -run.head", "normalize"),
    Mutant("walk.cuh", "edge < before_end", "edge <= before_end", "normalize"),
    Mutant("walk.cuh", "layout.inner < 8 ?", "layout.inner < 1 ?", "normalize"),
    Mutant("walk.cuh", "edge < run.length;", "edge <= run.length;", "stats"),
    Mutant("walk.cuh", "index * config.samples", "index", "stats"),
    Mutant("walk.cuh", "layout.outer - o, config.samples", "config.samples, config.samples", "stats"),
    Mutant("walk.cuh", "sample + u * config.samples_apart < run.samples", "sample < run.samples", "stats"),
    Mutant("walk.cuh", "at + u * config.along < run.body_length()", "at < run.body_length()", "stats"),
    Mutant("walk.cuh", "run.first + sample * config.sample_stride + at", "run.first + at", "normalize"),
    Mutant("walk.cuh", "run.row + sample * layout.C, config.row_stride", "run.row, config.row_stride", "normalize"),
    Mutant("walk.cuh", "begin < run.samples;", "begin < 1;", "normalize"),
    Mutant("walk.cuh", "begin += 2 * EDGE_UNROLL", "begin += EDGE_UNROLL", "stats"),
    Mutant("walk.cuh", "on_edge && sample + 2 * u < run.samples", "on_edge && sample < run.samples", "stats"),
    Mutant("walk.cuh", "run.first + sample * config.sample_stride + edge", "run.first + edge", "backward_input"),
    Mutant("walk.cuh", " 2 * config.sample_stride", " config.sample_stride", "backward_input"),
    Mutant("walk.cuh", "row = run.row + sample * layout.C", "row = run.row", "normalize"),
    Mutant("walk.cuh", ", 2 * layout.C,", ", layout.C,", "normalize"),
    Mutant("launch.cuh", "&& sample_stride % 8 == 0", "", "normalize"),
    Mutant("launch.cuh", "apart * sample_stride + along", "sample_stride + along", "stats"),
    Mutant("launch.cuh", "config.row_stride = apart * layout.C", "config.row_stride = layout.C", "normalize"),
    Mutant("walk.cuh", "int64_t{piece} * config.piece", "int64_t{piece} * (config.piece - 8)", "stats"),
    Mutant("walk.cuh", "- 1)) * VECTOR_WIDTH", "- 1))", "backward_input"),
    Mutant("walk.cuh", "(lane & ((1 << config.lane_bits) - 1)) * VECTOR_WIDTH", "lane * VECTOR_WIDTH", "backward_input"),
    Mutant("walk.cuh", "row * layout.C + channel", "channel * layout.outer + row", "backward_input"),
    Mutant("walk.cuh", "channel < layout.C &&", "channel <= layout.C &&", "normalize"),
    Mutant("walk.cuh", "row + u * rows < layout.outer", "row + u * rows <= layout.outer", "backward_input"),
    Mutant("walk.cuh", "runs - 1 - i", "runs - i", "backward_input"),
    Mutant("walk.cuh", "config.runs - 1 - i", "i - split", "backward_input", nth=1),
    Mutant(
        "reduce.cuh", "(w * CHANNELS + t % CHANNELS) * stride + t / CHANNELS", "(w * CHANNELS + t / width) * stride + t % width", "stats"
    ),
    Mutant("reduce.cuh", "split * C + first + column", "(first + column) * splits + split", "stats"),
    Mutant("reduce.cuh", "split < splits &&", "", "stats"),
    Mutant("reduce.cuh", "first + threadIdx.x < C", "true", "stats"),
    Mutant("reduce.cuh", "loaded[u] = {0, 0};", "", "stats"),
    Mutant("reduce.cuh", "r < rows &&", "", "backward_reduce", dtype="bfloat16"),
    Mutant("reduce.cuh", "&& r < splits", "&& r < splits - 1", "stats"),
    Mutant("reduce.cuh", "sums[r * columns + threadIdx.x]", "sums[threadIdx.x * rows + r]", "backward_reduce"),
    Mutant("launch.cuh", "warps * (width + 1) * vector", "warps * width * vector", "stats"),
    Mutant("launch.cuh", ", warps * WARP) * 16", ", 0) * 16", "backward_reduce"),
    Mutant("reduce.cuh", "offset = width;", "offset = 1;", "stats"),
    Mutant("reduce.cuh", "counter, blocks - 1)", "counter, blocks)", "stats"),
    Mutant("reduce.cuh", "k += BATCH * rows", "k += 2 * BATCH * rows", "backward_reduce", dtype="bfloat16"),
    Mutant("reduce.cuh", "k += BATCH * rows", "k += 2 * BATCH * rows", "stats", dtype="bfloat16"),
    Mutant("reduce.cuh", "k += BATCH * rows", "k += rows", "stats", dtype="bfloat16"),
    Mutant("reduce.cuh", "k + u * rows", "k + u", "stats"),
    Mutant("reduce.cuh", "workspace.counters[walk.group]", "workspace.counters[0]", "stats"),
    Mutant("mask.cuh", "bits << (f & 7)", "bits", "normalize"),
    Mutant("mask.cuh", "offset < 8 / VECTOR_WIDTH", "offset < 4 / VECTOR_WIDTH", "normalize"),
    Mutant("normalize.cu", "8 - f % 8", "7 - f % 8", "normalize"),
    Mutant("normalize.cu", "f % 8 != 0 && c != 0", "f % 8 != 0", "normalize"),
    Mutant("normalize.cu", "table[walk.column() + j](to_acc", "table[walk.column()](to_acc", "normalize"),
    Mutant("activation.cuh", ">> (step.index(u) & 7)", "", "backward_reduce"),
    Mutant("activation.cuh", ">> (step.index(u) & 7)", "", "backward_input"),
    # Alignment
    Mutant("walk.cuh", "reinterpret_cast<uintptr_t>(p) % 16 == 0", "true", "stats"),
    Mutant("walk.cuh", "reinterpret_cast<uintptr_t>(p) % 16 == 0", "true", "normalize"),
    Mutant("walk.cuh", "% 16 == 0", "% 4 == 0", "backward_reduce"),
    Mutant("walk.cuh", " && layout.C % (mask ? 8 : VECTOR_WIDTH) == 0", "", "stats"),
    Mutant("walk.cuh", " && layout.C % (mask ? 8 : VECTOR_WIDTH) == 0", "", "backward_input"),
    Mutant("walk.cuh", "(mask ? 8 : VECTOR_WIDTH)", "VECTOR_WIDTH", "normalize"),
    Mutant("walk.cuh", "(plane + 7) / 8 * 8", "plane", "stats"),
    Mutant("launch.cuh", "ceil_div(ceil_div(layout.inner, pieces), 8) * 8", "ceil_div(layout.inner, pieces)", "stats"),
    # Statistics
    Mutant("stats.cu", "- K[j % CHANNELS]", "", "stats"),
    Mutant("stats.cu", "2 * sum + nk", "sum + nk", "stats"),
    Mutant("stats.cu", "    n = 0;", "", "stats"),
    Mutant("stats.cu", "s1[j] = s2[j] = 0", "s1[j] = 0", "stats"),
    Mutant("stats.cu", "  bring();\n  warp_sums", "  warp_sums", "stats"),
    Mutant("stats.cu", "n += step.count * STEP_WIDTH / CHANNELS", "n += step.count * STEP_WIDTH", "stats"),
    Mutant("stats.cu", "args.rank_weighted && count > 0 ? count : 1", "1", "stats"),
    Mutant("stats.cu", "&& count > 0 ? count : 1", "? count : 1", "stats"),
    Mutant("stats.cu", "args.rank_weighted ? count > 0", "args.rank_weighted ? 1", "stats"),
    Mutant("stats.cu", "- to_acc(channel_shift[j])", "", "stats", dtype="float64"),
    Mutant("stats.cu", "args.shifted && args.layout.outer * args.layout.inner > 0", "args.shifted", "stats"),
    Mutant("../formulas.h", "- offset * offset", "", "normalize"),
    Mutant("../formulas.h", "weight < 1 ? 1 :", "", "normalize", dtype="float64"),
    Mutant("../formulas.h", "weight < 1 ? 1 :", "", "backward_reduce"),
    Mutant("../formulas.h", "divisor_of(rank_weighted", "(rank_weighted", "backward_input", dtype="float64"),
    Mutant("../formulas.h", "var < 0 ? 0 : var", "var", "normalize", dtype="bfloat16"),
    Mutant("../formulas.h", "clamped + eps", "clamped", "normalize"),
    Mutant("finalize.cuh", "stats_tail::weight", "stats_tail::samples", "normalize"),
    # The exchange's tag
    Mutant("../args.h", "tag_sum == tag &&", "", "normalize"),
    Mutant("../args.h", "&& tag_squared_sum == tag_squared", "", "backward_input"),
    Mutant("verify.cuh", "!verification.holds", "verification.holds", "normalize"),
    Mutant("verify.cuh", "alarm) = 1", "alarm) = 0", "backward_input"),
    Mutant("verify.cuh", "sums[1]", "sums[0]", "normalize"),
    Mutant("normalize.cu", "tag_sums.verify(args.verification);", "", "normalize"),
    Mutant("backward_input.cu", "tag_sums.verify(args.verification);", "", "backward_input"),
    Mutant("stats.cu", "args.tag * args.tag", "args.tag", "stats"),
    Mutant("backward_reduce.cu", "args.tag * args.tag", "args.tag", "backward_reduce"),
    Mutant("../formulas.h", "(shift - hi) + offset", "(shift + offset) - hi", "normalize", dtype="float64"),
    Mutant("../formulas.h", "bias - lo * scale", "bias", "normalize"),
    Mutant("../formulas.h", "rank_weighted ? weight", "false ? weight", "backward_input"),
    Mutant("vec.cuh", "  c *= v.stride;\n", "", "normalize"),
    Mutant("vec.cuh", "  c *= v.stride;\n", "", "normalize", 1),
    # The moving statistics
    Mutant("../formulas.h", "0) + 1)", "0))", "normalize"),
    Mutant("reduce.cuh", "arrived == blocks - 1", "arrived == blocks", "normalize"),
    Mutant("normalize.cu", "walk.split == 0 && t < columns", "t < columns", "normalize"),
    Mutant("../formulas.h", "count > 2 ? count - 1 : 1", "count", "normalize"),
    Mutant("../formulas.h", "count > 2 ? count - 1 : 1", "count - 1", "normalize"),
    Mutant("normalize.cu", "!(count > 0) || factor == 0", "!(count > 0)", "normalize", dtype="float64"),
    Mutant("normalize.cu", "!(count > 0) || factor == 0", "factor == 0", "normalize"),
    Mutant("normalize.cu", "last && count > 0", "last", "normalize"),
    Mutant("normalize.cu", ": walk.group == 0;", ": true;", "normalize"),
    Mutant("normalize.cu", "updates && t == 0 &&", "updates &&", "normalize"),
    # The workspace, null unless asked for
    Mutant("normalize.cu", "args.num_batches_tracked && args.cumulative;", "false;", "normalize"),
    Mutant("walk.cuh", "shares = config.splits > 1", "shares = config.splits > 2", "stats"),
    # Activations
    Mutant("activation.cuh", "!(z <= 0)", "z > 0", "normalize"),
    Mutant("activation.cuh", "1 + z * (1 - s)", "1 + z", "backward_input"),
    Mutant("activation.cuh", "? dz[j] * negative_slope", "? acc_t{0}", "backward_input"),
    # Backward
    Mutant("backward_reduce.cu", "total.b - lo * total.a", "total.b", "backward_reduce"),
    Mutant("backward_reduce.cu", "* m.invstd", "", "backward_reduce"),
    Mutant("backward_reduce.cu", "write(args.dbias, channel, total.a)", "write(args.dbias, channel, total.b)", "backward_reduce"),
    Mutant("backward_input.cu", "p.lo * slope -", "-", "backward_input"),
    Mutant("backward_input.cu", "args.sums[C + channel]", "args.sums[channel]", "backward_input"),
    Mutant("backward_input.cu", "- affine[j % CHANNELS].hi", "", "backward_input"),
    Mutant("backward_input.cu", "dz + step.index(u)", "dz + step.first", "backward_input"),
    Mutant("activation.cuh", "z += add.get(j)", "z += 0", "backward_input"),
]


def is_noticed(library, op: str, dtype: str) -> bool:
    child = multiprocessing.get_context("fork").Process(target=run_all_checks_in_time, args=(library, op, dtype))
    child.start()
    child.join()
    return child.exitcode != 0


def run_all_checks_in_time(path: str, op: str, dtype: str) -> None:
    """run_all_checks(), but ends after 30 s of processor time: a mutant may run forever."""
    resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
    run_all_checks(path, op, getattr(torch, dtype))


def build(library: Path, sources: Path, op: str, folder: Path) -> Path:
    emulated.compile_kernel(sources / f"{op}.cu", folder / "mutant.o", "-O0")
    return emulated.link(library.parent, {op: folder / "mutant.o"})


MUTANTS = [*deleted_barriers(), *overlooked_tensors(), *CHANGED]


@pytest.mark.parametrize("op", emulated.OPS)
def test_unmodified_kernels_pass(library, op):
    run_all_checks(library, op)


@pytest.mark.nightly
@pytest.mark.parametrize(("op", "dtype"), sorted({(mutant.op, mutant.dtype) for mutant in MUTANTS}))
def test_unmodified_kernels_of_one_type_pass(library, tmp_path, op, dtype):
    assert not is_noticed(build(library, sources_for([dtype], tmp_path), op, tmp_path), op, dtype)


@pytest.mark.nightly
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(library, tmp_path, mutant):
    sources = sources_for([mutant.dtype], tmp_path)
    parts = (sources / mutant.file).read_text().split(mutant.old)
    assert len(parts) > mutant.nth + 1, f"{mutant.old!r} is not in {mutant.file}"
    changed = mutant.old.join(parts[: mutant.nth + 1]) + mutant.new + mutant.old.join(parts[mutant.nth + 1 :])
    (sources / mutant.file).write_text(changed)
    assert is_noticed(build(library, sources, mutant.op, tmp_path), mutant.op, mutant.dtype)
