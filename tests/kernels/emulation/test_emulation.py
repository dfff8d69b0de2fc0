"""The CUDA kernels, compiled for the CPU by tests/kernels/emulation, against the float64 reference. tests/README.md: what this misses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import emulated
from support.mutants import MANY_BLOCKS
from support.op_cases import Case, table
from support.op_checks import CHECKS, check_moved_all_the_way
from support.spoiled import CASES, error_of_the_variance

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")]

# These have every tensor: silu reads the residual again, and writes its gradient.
OFF_ALIGNMENT = [
    Case((70, 8, 3, 3), activation="silu", residual=True),
    Case((33, 24, 2, 2), True, torch.bfloat16, activation="silu", residual=True),
]


@pytest.mark.parametrize("case", table(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_equals_the_reference(kernels, op, case):
    CHECKS[op](kernels.varied(op, case), case)


@pytest.mark.parametrize("case", OFF_ALIGNMENT, ids=str)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in emulated.OPS.items() for name in names])
def test_any_single_tensor_may_be_misaligned(kernels, op, name, case):
    CHECKS[op](replace(kernels, misaligned=(name,)), case)


@pytest.mark.parametrize("op", CHECKS)
@pytest.mark.parametrize("case", [Case((500, 128), momentum=None), Case((1, 2, 40, 61), activation="relu", residual=True)], ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(kernels, op, case):
    results: list[list[torch.Tensor]] = []

    class Recording:
        def __getattr__(self, name):
            def call(*arguments):
                out = getattr(replace(kernels, seed=len(results), sm_count=7), name)(*arguments)
                results.append([out] if isinstance(out, torch.Tensor) else list(out))
                return out

            return call

    for _ in range(6):
        CHECKS[op](Recording(), case)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            same = a.flatten().view(torch.uint8) == b.flatten().view(torch.uint8)
            # This includes padding bits of the mask: those that no kernel writes stay as they were poisoned, the same in each run.
            assert bool(same.all())


@pytest.mark.parametrize("op", ["stats", "backward_reduce"])
def test_a_group_may_have_more_blocks_than_partial_sums_read_in_one_step(kernels, op):
    CHECKS[op](replace(kernels, sm_count=MANY_BLOCKS[0]), MANY_BLOCKS[1])


@pytest.mark.parametrize("shape,kind", CASES)
def test_the_variance_keeps_its_digits_wherever_zeros_or_outliers_are(kernels, shape, kind):
    """Float sums of squares would be off by a factor, those about a value far from the others by 1e-3."""
    assert error_of_the_variance(replace(kernels, sm_count=1).stats, kind, shape) < 1e-6


def test_moving_statistics_are_the_batchs_where_nothing_is_kept(kernels):
    check_moved_all_the_way(kernels)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"divergent: in block \d 40 threads wait at the barrier \S+faulty.cu:\d+, 0 in a warp operation, 24 have left"),
        (2, r"divergent: threads meet at \S+faulty.cu:(\d+) and at \S+faulty.cu:(?!\1)"),
        (3, r"divergent: in block \d 56 threads wait at the barrier \S+faulty.cu:\d+, 8 in a warp operation, 0 have left"),
        (4, r"only full masks are emulated: \S+faulty.cu:\d+"),
        (5, r"shared memory written out of bounds: \S+faulty.cu:\d+"),
        (6, "shared memory written out of bounds: dynamic shared memory"),
        (7, r"misaligned: address % 16 is 4 at \S+cuda_emulation.h"),
        (8, "^written out of bounds"),
        (9, "^written out of bounds"),
    ],
)
def test_a_fault_is_found_and_the_next_launch_is_clean(kernels, fault, message):
    with pytest.raises((RuntimeError, AssertionError), match=message):
        kernels.fault(fault)
    kernels.fault(0)
