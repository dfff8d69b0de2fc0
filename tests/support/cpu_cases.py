"""Each op of the CPU kernels against `reference.py` in float64.

Tolerances: a kernel computes in float32 (float64 for float64) and rounds once to the type of its output. So an element may be off
by half an ulp of that type, plus a few float32 roundings of the terms that it is made of; `close` writes that down once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from support.closeness import assert_within
from syncbn import native, ops, reference
from syncbn.activation import Activation, keeps_mask
from syncbn.layout import samples_per_channel

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FUSIONS = [(activation, add) for activation in Activation for add in (False, True)]
RANKS = [(1, False), (3, False), (3, True)]  # number of ranks, each with the case's samples; do ranks, not samples, have equal weight?
SLOPE, EPS = 0.1, 1e-5

CPU = native.status()[0]
ISAS = ("avx512", "avx2", "baseline")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class CpuCase:
    """Arguments of the four ops for one shape; `exact` gives the same in float64."""

    def __init__(self, shape, dtype, layout, seed=0):
        generator = torch.Generator().manual_seed(seed)
        random = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        draws = (2 * random(*shape) + 3, random(*shape), random(*shape))
        self.x, self.residual, self.dy = (layout(draw.to(dtype)) for draw in draws)
        self.weight, self.bias = random(shape[1]) + 0.5, random(shape[1])
        self.stats = reference.stats(self.x.double(), False)


def on_each(isas, op, args) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(instruction set, op(*args)) for each of `isas` that this processor has; for the one in use if `isas` is empty."""
    in_use = native.cpu_isa(CPU.path)
    for isa in isas or (in_use,):
        try:
            if native.cpu_isa(CPU.path, isa) != isa:
                continue
            result = op(*args)
        finally:
            native.cpu_isa(CPU.path, in_use)
        yield isa, result


def exact(args):
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def close(got: Tensor, want: Tensor, terms: float, name: str = "") -> None:
    """8 roundings, in the type of computation, of terms as large as `terms`; in 16 bits also half an ulp of the result."""
    acc = torch.finfo(reference.acc_type(got.dtype)).eps
    tolerance = torch.finfo(got.dtype).eps / 2 * want.abs() * (got.dtype.itemsize == 2) + 8 * acc * terms
    tolerance = tolerance + (3e-8 if got.dtype == torch.float16 else 0)  # half of its smallest subnormal
    assert_within(got, want, tolerance, name)


def normalize_args(case, activation, add, running=(None, None, None), momentum=0.1, unbiased=True):
    residual = case.residual if add else None
    return (case.x, case.stats, case.weight, case.bias, residual, *running, momentum, unbiased, EPS, activation, SLOPE)


def kept_mask(case, activation, add):
    mask = ops.normalize(*normalize_args(case, activation, add))[1]
    return mask if keeps_mask(activation, add) else None


def backward_args(case, activation, add, *, stats=None, sums=None):
    """The arguments of backward_reduce; those of backward_input if sums are given."""
    residual = case.residual if add else None
    stats = case.stats if stats is None else stats
    how = (case.weight, case.bias, residual, kept_mask(case, activation, add), EPS, activation, SLOPE)
    return (case.dy, *([] if sums is None else [sums]), case.x, stats, *how)


def check_stats(shape, dtype, layout):
    x = CpuCase(shape, dtype, layout).x
    for rank_weighted, shifted in itertools.product((False, True), repeat=2):
        got, want = (f.stats(t, rank_weighted, shifted) for f, t in ((ops, x), (reference, x.double())))
        # The sums come from chunks of at most 1024 additions for each lane, as a tree, whose errors do not grow with mean / std.
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance * max(samples_per_channel(x), 1))
        assert got[: shape[1]].tolist() == want[: shape[1]].tolist() and got[3 * shape[1] :].tolist() == want[3 * shape[1] :].tolist()


def check_normalize(shape, dtype, layout, fusions=FUSIONS, isas=()):
    case = CpuCase(shape, dtype, layout)
    for activation, add in fusions:
        args = normalize_args(case, activation, add)
        want, want_mask = reference.normalize(*exact(args))
        for isa, (y, mask) in on_each(isas, ops.normalize, args):
            close(y, want, 10, f"{activation} {add} {isa}")
            assert y.stride() == case.x.stride() and mask.shape == want_mask.shape
            # A sign may differ only where z is within rounding of 0, which these seeds do not hit in float64. Both write padding bits as
            # zeros.
            assert (mask != want_mask).sum() <= (0 if dtype == torch.float64 else 1)


def check_backward_reduce(shape, dtype, layout, fusions=FUSIONS):
    case = CpuCase(shape, dtype, layout)
    n = max(samples_per_channel(case.x), 1)
    for activation, add in fusions:
        args = backward_args(case, activation, add)
        got, want = ops.backward_reduce(*args), reference.backward_reduce(*exact(args))
        # n terms of size 1 in chunks of at most 1024 for each lane, as a tree: its roundings are far below n eps 8.
        assert got[0][2 * shape[1] :].tolist() == want[0][2 * shape[1] :].tolist() == [0, 0]
        assert ((got[0] - want[0]).abs() <= 8 * n * torch.finfo(reference.acc_type(dtype)).eps).all(), (activation, add)
        for gradient, parameter, part in ((got[1], case.weight, got[0][shape[1] : 2 * shape[1]]), (got[2], case.bias, got[0][: shape[1]])):
            assert gradient.dtype == parameter.dtype and torch.equal(gradient, part.to(parameter.dtype))


def check_backward_input(shape, dtype, layout, fusions=FUSIONS, isas=(), ranks=RANKS):
    case = CpuCase(shape, dtype, layout)
    of_all_ranks = [n * (reference.stats(case.x.double(), True) if rank_weighted else case.stats) for n, rank_weighted in ranks]
    for activation, add in fusions:
        sums = reference.backward_reduce(*exact(backward_args(case, activation, add)))[0]
        for stats, (_, rank_weighted) in zip(of_all_ranks, ranks, strict=True):
            args = (*backward_args(case, activation, add, stats=stats, sums=sums), rank_weighted)
            want, want_dz = reference.backward_input(*exact(args))
            invstd = reference.finalize(stats, EPS)[2]  # with a single sample, dz and its mean cancel, each scaled by 1 / sqrt(eps)
            for isa, (dx, dz) in on_each(isas, ops.backward_input, args):
                close(dx, want, max(10, 4 * float(invstd.max())), f"{activation} {add} {isa}")
                close(dz, want_dz, 4, f"dz {activation} {add} {isa}")
                assert dx.stride() == case.x.stride() and (not dz.numel() or dz.stride() == case.x.stride())


CPU_CHECKS = {
    "stats": check_stats,
    "normalize": check_normalize,
    "backward_reduce": check_backward_reduce,
    "backward_input": check_backward_input,
}
