"""Kernels changed on purpose: their sources, and the comparisons that a mutant must not survive."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from support import emulated
from support.op_cases import EXTREMES, TAGGED, Case
from support.op_checks import CHECKS

# On 72 multiprocessors, the blocks that share a tile of channels are more than the partial sums that the last of them reads in one step.
MANY_BLOCKS = (72, Case((8448, 72), dtype=torch.bfloat16, activation="relu", residual=True))
# On one multiprocessor, a thread walks over more values than `stats` sums about one K.
LONG_WALK = (1, Case((5, 1, 128, 128)))
# Blocks share sums. If a barrier is missing, the last of them comes too early in a fifth of the orders.
SHARED = (7, Case((500, 128), activation="silu", residual=True))

# Few cases, but with each edge that a mutant of test_mutations.py is about.
CASES = [
    Case((3, 2, 2), activation="relu", residual=True),
    Case((3, 5, 7), activation="relu", residual=True),
    Case((70, 8, 3, 3), dtype=torch.bfloat16, activation="silu"),
    Case((37, 8, 7, 7), activation="relu", residual=True),
    Case((37, 8, 7, 7), dtype=torch.bfloat16, activation="leaky_relu", residual=True),
    Case((6, 44), activation="relu", residual=True),
    Case((6, 44)),
    Case((1, 2, 40, 61), activation="leaky_relu", residual=True, momentum=None),
    Case((1, 2, 40, 61), activation="leaky_relu", unbiased=False),
    Case((1, 3, 606)),
    Case((3, 70, 4), channels_last=True, activation="relu", residual=True, momentum=None),
    Case((33, 24, 2, 2), channels_last=True, activation="leaky_relu", residual=True, rank_weighted=True),
    Case((500, 16), activation="relu", dtype=torch.bfloat16, rank_weighted=True),
    Case((500, 128), activation="silu", residual=True),
    Case((40, 256), dtype=torch.bfloat16),
    *EXTREMES,
    *TAGGED,
]  # fmt: skip


def sources_for(dtypes: Collection[str], folder: Path) -> Path:
    """csrc/cuda for these types of x: of one type it is a quarter of the code, which compiles in less than half the time."""
    sources = shutil.copytree(emulated.KERNELS.parent, folder / "csrc") / "cuda"
    text = (sources / "vec.cuh").read_text()
    text, others = re.subn(rf"case DType::(?!(?:{'|'.join(dtypes)}):)\w+: return f\(.*", "", text)
    assert others == len(emulated.DTYPES) - len(dtypes), "with_dtype() in vec.cuh has changed"
    (sources / "vec.cuh").write_text(text)
    return sources


def run_all_checks(path: str, op: str, dtype: torch.dtype | None = None) -> None:
    """Raises if a comparison fails: of all cases, or of those of one type."""
    kernels = emulated.Emulated.load(path)
    cases = [case for case in CASES if dtype in (None, case.dtype)]
    for seed, misaligned in enumerate([(), (), (), (), (), (), *((name,) for name in emulated.OPS[op])]):
        for case in cases:
            CHECKS[op](replace(kernels, seed=seed, sm_count=(1, 2, 7)[seed % 3], misaligned=misaligned), case)
    for (sm_count, case), seeds in ((MANY_BLOCKS, 1), (LONG_WALK, 1), (SHARED, 25)):
        for seed in range(seeds if dtype in (None, case.dtype) else 0):
            CHECKS[op](replace(kernels, sm_count=sm_count, seed=seed), case)
