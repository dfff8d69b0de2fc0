"""Every Plan that benchmarks/sweep.cu tries gives right results, in the emulation: any of them may be chosen after a sweep."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from support import ROOT, emulated
from support.mutants import MANY_BLOCKS, sources_for
from support.op_cases import Case
from support.op_checks import CHECKS

pytestmark = [pytest.mark.nightly, pytest.mark.world_size(1), pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")]

SWEEP = (ROOT / "benchmarks" / "sweep.cu").read_text()
# Blocks on a multiprocessor, vectors in a step, and the vectors in a tile of channels.
CONTIGUOUS = re.findall(r"contiguous<SweptPlan<(\d+), (\d+)>>", SWEEP)
CHANNELS_LAST = [(*plan[:2], plan[2] or "8") for plan in re.findall(r"channels_last<SweptPlan<(\d+), (\d+)(?:, (\d+))?>>", SWEEP)]
NAMES = {"StatsPlan": True, "NormalizePlan": False, "BackwardReducePlan": True, "BackwardInputPlan": False}  # and their `sums`

HEADER = "#pragma once\n#define SYNCBN_PLANS\nnamespace syncbn::cuda {{\n{plans}}}\n"
PLAN = """template <int bytes>
struct {name} {{
  static constexpr int planes_blocks = {0}, planes_unroll = {1}, columns_blocks = {2}, columns_unroll = {3}, columns_width = {4};
  static constexpr bool reversed = {reversed}, sums = {sums};
}};
"""

CASES = [
    Case((37, 8, 7, 7), activation="relu", residual=True),
    Case((37, 8, 7, 7), dtype=torch.bfloat16, activation="leaky_relu", residual=True, momentum=None),
    Case((21, 8, 14, 14), dtype=torch.bfloat16, activation="relu"),
    Case((1, 2, 40, 61), activation="silu", residual=True),
    Case((33, 24, 2, 2), True, torch.bfloat16, activation="relu", residual=True),  # fewer vectors than the tile has
    Case((500, 128), activation="leaky_relu", residual=True),
    Case((19, 520), dtype=torch.bfloat16, shifted=True),
    Case((3, 70, 4), True, momentum=None),
]


def test_the_sweep_has_plans_of_both_layouts():
    assert len(CONTIGUOUS) == len(CHANNELS_LAST) >= 6
    assert {width for *_, width in CHANNELS_LAST} == {"4", "8"}


@pytest.mark.parametrize("plan", list(zip(CONTIGUOUS, CHANNELS_LAST, strict=True)), ids=str)
def test_every_plan_of_the_sweep_is_right(tmp_path, plan):
    values = [value for layout in plan for value in layout]
    text = "".join(PLAN.format(*values, name=name, sums=str(s).lower(), reversed=str(not s).lower()) for name, s in NAMES.items())
    (tmp_path / "plans.cuh").write_text(HEADER.format(plans=text))
    types = {str(case.dtype).removeprefix("torch.") for case in [*CASES, MANY_BLOCKS[1]]}
    library = emulated.build(tmp_path, "-include", str(tmp_path / "plans.cuh"), kernels=sources_for(types, tmp_path))
    kernels = emulated.Emulated.load(library)
    for op in CHECKS:
        for seed, sm_count in enumerate((1, 2, 7)):
            for case in CASES:
                CHECKS[op](replace(kernels, seed=seed, sm_count=sm_count), case)
        CHECKS[op](replace(kernels, sm_count=MANY_BLOCKS[0]), MANY_BLOCKS[1])
