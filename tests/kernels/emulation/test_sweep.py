"""benchmarks/sweep.cu in the emulation: its options, its rows and its table. There a replay takes 1 ms: see host_runtime.h."""

from __future__ import annotations

import csv
import math
import re
import subprocess

import pytest

from support import ROOT, emulated

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")]

MOVED = {"stats": 1, "normalize": 2, "backward_reduce": 2, "backward_input": 3}  # tensors of x's size
SHAPES = {"2x8x5x5": 400, "3x16x2x3": 288}  # and their elements
REPLAY_US, CALLS, POOL_BYTES = 1000, 2, 1 << 20


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Runs the program of an op with these options."""
    folder = tmp_path_factory.mktemp("sweep")

    def run(op: str, *options: str) -> subprocess.CompletedProcess[str]:
        program = folder / op
        if not program.exists():
            emulated.build_sweep(op, program)
        return subprocess.run([program, *options], capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("op", emulated.OPS)
def test_every_plan_has_a_row_with_its_share_of_the_copy_rate_and_a_column_of_the_table(sweep, op):
    shapes = [option for shape in SHAPES for option in ("--shape", shape)]
    done = sweep(op, "--pool", str(POOL_BYTES >> 20), "--calls", str(CALLS), "--repeats", "1", *shapes)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    copy_rate = 2 * POOL_BYTES / (REPLAY_US / 4)  # bytes in a microsecond; the copy is captured four times
    assert lines[0] == f"# emulated, 2 SMs, copy {copy_rate / 1e6:.3g} TB/s"

    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    for row in rows:
        us, size = REPLAY_US / CALLS, SHAPES[row["shape"]] * (4 if row["dtype"] == "fp32" else 2)
        assert row["op"] == op and float(row["us"]) == us
        assert float(row["share"]) == pytest.approx(MOVED[op] * size / us / copy_rate, rel=1e-3)
    for layout in ("contiguous", "channels-last"):
        of_layout = [(row["dtype"], row["shape"], row["plan"]) for row in rows if row["layout"] == layout]
        plans = list(dict.fromkeys(plan for *_, plan in of_layout))
        assert plans[0] == "built" and len(plans) >= 7
        assert of_layout == [(dtype, shape, plan) for dtype in ("bf16", "fp32") for shape in SHAPES for plan in plans]
        start = next(i for i, line in enumerate(lines) if line.startswith(f"# {op} {layout} "))
        assert re.split(r"\s{2,}", lines[start])[1:] == plans
        for line, name in zip(lines[start + 1 :], [f"{d} {s}" for d in ("bf16", "fp32") for s in SHAPES], strict=False):
            shares = [f"{float(row['share']):.3f}" for row in rows if (row["layout"], f"{row['dtype']} {row['shape']}") == (layout, name)]
            assert line.split() == ["#", *name.split(), *shares]
        for line, dtype in zip(lines[start + 1 + 2 * len(SHAPES) :], ("bf16", "fp32"), strict=False):
            both = [float(row["share"]) for row in rows if (row["layout"], row["dtype"], row["plan"]) == (layout, dtype, "built")]
            assert line.startswith(f"# {dtype} geometric mean")
            assert [float(share) for share in line.split()[4:]] == pytest.approx([math.prod(both) ** 0.5] * len(plans), abs=1e-3)
            # All replays take the same time: the first plan is the best.
            assert f"# best {op} {layout} {dtype}: plan built {line.split()[4]}, plan built {line.split()[4]}" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "3"], "unknown option --plan"),
        (["--pool"], "--pool needs positive integers, got ''"),
        (["--repeats", "0"], "--repeats needs positive integers, got '0'"),
        (["--shape", "8x16"], "--shape must be NxCxHxW or the like, got 8x16"),
        (["--shape", "8xx16"], "--shape needs positive integers, got ''"),
        (["--shape", "8x16x1x1"], "--shape needs planes of more than one value, and C % 8 == 0, got 8x16x1x1"),
        (["--shape", "8x12x7x7"], "--shape needs planes of more than one value, and C % 8 == 0, got 8x12x7x7"),
        (["--pool", "1", "--shape", "8x64x56x56"], "the pool is smaller than 8x64x56x56 in float32"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_by_name(sweep, options, message):
    done = sweep("stats", *options)
    assert done.returncode == 2 and f"sweep: {message}\nusage: sweep" in done.stderr


def test_help_needs_no_card(sweep):
    done = sweep("stats", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: sweep") and done.stderr == ""


def test_the_comment_and_the_usage_name_the_same_options():
    source = (ROOT / "benchmarks" / "sweep.cu").read_text()
    usage = re.search(r'USAGE = "(.*)"', (ROOT / "benchmarks" / "sweep.h").read_text())[1]
    options = re.findall(r"--\w+", usage)
    assert options and re.findall(r"--\w+", source.partition("#define")[0]) == options
