"""The CUDA kernels, compiled for the CPU by tests/emulation, against the float64 reference. What this cannot see: README.md."""

from __future__ import annotations

import zlib
from dataclasses import replace

import emulated
import pytest
import torch
from op_cases import CHECKS, Case, table

from syncbn import reference

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def kernels(library):
    return emulated.Emulated.load(library)


@pytest.mark.parametrize("case", table(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_equals_the_reference(kernels, op, case):
    seed = zlib.crc32(repr((op, case)).encode())
    # 1, 2 or 7 multiprocessors: one block per channel, some, and more than there is work for. One case in 4 is misaligned.
    ops = replace(kernels, seed=seed, sm_count=(1, 2, 7)[seed % 3], offset=(0, 0, 0, 1)[seed // 3 % 4])
    CHECKS[op](ops, case)
