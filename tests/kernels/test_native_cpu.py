"""The CPU kernels equal `reference.py` in float64, over the edges of every loop. Tolerances: support/cpu_cases.py."""

from __future__ import annotations

import math

import pytest
import torch

from support.cpu_cases import (
    CPU,
    CPU_CHECKS,
    DTYPES,
    ISAS,
    RANKS,
    CpuCase,
    check_backward_input,
    check_backward_reduce,
    check_normalize,
    check_stats,
    every_dtype,
    normalize_args,
)
from support.layouts import LAYOUTS, contiguous, every_layout
from support.op_cases import TAGGED
from support.op_checks import CHECKS
from syncbn import native, ops, reference
from syncbn.activation import Activation

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)]

SHAPES = [
    (3, 7, 5, 11),  # primes: nothing divides a vector
    (2, 3, 7, 7),  # planes of 3 vectors and a tail
    (1, 1, 1, 16),  # one vector exactly
    (2, 2, 97, 97),  # odd planes, one to a chunk
    (1, 6, 1, 33001),  # planes in several chunks, which start inside bytes of the mask
    (3, 5, 1, 33001),  # more values of a channel than a partial sum covers
    (40, 9, 13, 20),  # several planes in a chunk, and a channel left over by the concurrent streams
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
    (11, 2048),  # 2-D: wide rows in concurrent streams, and some left over
    (140, 2080),  # the same, with threads and runs that begin within a row
    (1, 5),  # fewer values than a vector
    (700, 3),  # rows folded, the last one short
    (2, 3, 4, 5, 6),  # 5-D
    (0, 4, 5, 5),  # an empty batch
    (3, 4, 0, 5),  # empty planes
]
# csrc/cpu/traverse.h: the kernels write outputs of this size or more with non-temporal stores
STREAM_BYTES = 2 << 20


@every_layout
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", CPU_CHECKS)
def test_kernel_equals_the_reference(op, shape, dtype, layout):
    CPU_CHECKS[op](shape, dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_many_rows_equal_the_reference(dtype):
    """Blocks of rows for threads, each of more than a chunk of 512."""
    check_stats((8352, 512), dtype, contiguous)
    check_backward_reduce((8352, 512), dtype, contiguous, [(Activation.none, False), (Activation.relu, True)])


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
@every_dtype
def test_a_narrower_instruction_set_equals_the_reference(isa, dtype):
    widest = native.cpu_isa(CPU.path)
    if widest == isa or native.cpu_isa(CPU.path, isa) != isa:
        pytest.skip(f"{isa} is what the other tests run, or is not here")
    try:
        for shape in [(3, 7, 5, 11), (2, 3, 7, 7), (9, 48, 7, 7), (5, 4, 2, 2), (1, 5), (9, 33), (300, 3)]:
            for layout in LAYOUTS:
                for check in CPU_CHECKS.values():
                    check(shape, dtype, layout)
        for case in TAGGED:
            for check in CHECKS.values():
                check(ops, case)
    finally:
        native.cpu_isa(CPU.path, widest)


@every_layout
@every_dtype
@pytest.mark.parametrize("shape", [(37, 901, 7, 7), (75001, 21), (5, 4, 283, 283)], ids=str)
def test_non_temporal_stores_equal_the_reference(shape, dtype, layout):
    """Outputs above the 2 MB threshold for non-temporal stores, with planes and rows that end inside a cache line; on several threads and
    with each instruction set. The stores do not depend on how many ranks the statistics are of: one row of RANKS is enough."""
    shape = (math.ceil(shape[0] * 2 / dtype.itemsize), *shape[1:])  # of as many bytes in each type
    assert CpuCase(shape, dtype, layout).x.nbytes > 3 << 20 > STREAM_BYTES
    fusions = [(Activation.relu, True), (Activation.none, False), (Activation.silu, True)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check_normalize(shape, dtype, layout, fusions, ISAS)
        check_backward_input(shape, dtype, layout, fusions, ISAS, RANKS[1:2])
    finally:
        torch.set_num_threads(before)


def test_the_kernels_run_and_not_the_reference():
    for name in ops.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"syncbn::{name}", "CPU")


# ---- Moving statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_statistics_move_by_the_momentum(momentum, unbiased, dtype):
    case = CpuCase((4, 5, 3), torch.float32, contiguous)
    got = (torch.ones(5, dtype=dtype), torch.ones(5, dtype=dtype), torch.tensor(3))
    want = (torch.ones(5).double(), torch.ones(5).double(), torch.tensor(3))
    for _ in range(2):
        ops.normalize(*normalize_args(case, Activation.none, False, got, momentum, unbiased))
        reference.normalize(*normalize_args(case, Activation.none, False, want, momentum, unbiased))
    # Rounded once a step: twice an ulp, and half precision goes through float32.
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.allclose(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert got[2] == want[2] == 5
