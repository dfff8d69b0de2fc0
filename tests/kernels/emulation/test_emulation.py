"""The CUDA kernels, compiled for the CPU by tests/kernels/emulation, against the float64 reference. README.md says what this cannot see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import emulated
from support.mutants import MANY_BLOCKS
from support.op_cases import Case, table
from support.op_checks import CHECKS, check_moved_all_the_way
from syncbn import reference

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
            # No kernel writes the mask's padding bits: they stay as they were poisoned, the same in each run.
            assert bool(same.all())


@pytest.mark.parametrize("op", CHECKS)
def test_a_group_may_have_more_blocks_than_partial_sums_read_in_one_step(kernels, op):
    CHECKS[op](replace(kernels, sm_count=MANY_BLOCKS[0]), MANY_BLOCKS[1])


@pytest.mark.parametrize("shape", [(2, 3, 64, 65), (900, 8)], ids=str)
def test_the_variance_keeps_its_digits_where_mean_is_far_above_std(kernels, shape):
    x = 1e4 + torch.randn(shape)
    got, want = replace(kernels, sm_count=3).stats(x, False), reference.stats(x.double(), False)
    (_, var, _), (_, want_var, _) = reference.finalize(got, 0.0), reference.finalize(want, 0.0)
    # Float sums of squares would be off by a factor; what is left is float64's (mean / std)^2 2^-53 and float32 in a thread.
    assert float(((var - want_var) / want_var).abs().max()) < 1e-6


def test_leading_outlier_does_not_ruin_the_shift(kernels):
    x = 1000 + torch.randn(4, 2, 50, 50)
    x[0, :, 0, 0] = 0
    got, want = kernels.stats(x, False), reference.stats(x.double(), False)
    (_, var, _), (_, want_var, _) = reference.finalize(got, 0.0), reference.finalize(want, 0.0)
    assert float(((var - want_var) / want_var).abs().max()) < 1e-6  # a shift by the first value is off by 1e-3


def test_moving_statistics_are_the_batchs_where_nothing_is_kept(kernels):
    check_moved_all_the_way(kernels)


@pytest.mark.parametrize(("shape", "zeros"), [((16, 2, 48, 48), 2), ((32, 8, 14, 14), 1), ((6000, 8), 40), ((6000, 64), 200)], ids=str)
def test_zeros_in_front_do_not_spoil_the_shift(kernels, shape, zeros):
    x = 1000 + torch.randn(shape)
    x[:zeros] = 0
    got, want = replace(kernels, sm_count=1).stats(x, False, True), reference.stats(x.double(), False, True)
    (_, var, _), (_, want_var, _) = reference.finalize(got, 0.0), reference.finalize(want, 0.0)
    assert float(((var - want_var) / want_var).abs().max()) < 1e-6


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
