"""One check for each op: a compiled kernel gives what the float64 reference gives.

A check_OP takes `ops`, anything with the four ops as methods (torch.ops.syncbn, the emulated kernels), and one Case. Each op
gets its inputs from the reference, so that one op's error is not another's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.closeness import assert_within
from support.op_cases import EPS, SLOPE, SUM_TOLERANCE, TAG, VALUE_TOLERANCE, Alarm, Case, as_is, backward_arguments, doubled, make
from syncbn import moments, reference
from syncbn.activation import Activation
from syncbn.layout import is_channels_last


def assert_values_close(got: Tensor, want: Tensor, tolerance: float, what: str, scale: Tensor | float = 0.0) -> None:
    """|got - want| <= tolerance * max(|want|, scale, 1), and NaN only where NaN is wanted."""
    scale = torch.as_tensor(scale, dtype=want.dtype, device=want.device).expand_as(want)
    assert_within(got, want, tolerance * torch.maximum(want.abs(), scale).clamp(min=1), what, nan_where_wanted=True)


def per_channel(t: Tensor) -> Tensor:
    """Sum over all dimensions but the second."""
    return t.movedim(1, 0).flatten(1).sum(1)


def check_stats(ops: Any, case: Case, device: str = "cpu") -> None:
    x = make(case, device).x
    got, want = (f.stats(t, case.rank_weighted, case.shifted, TAG) for f, t in ((ops, x), (reference, x.double())))
    assert got.dtype == torch.float64
    divisor = max(x.numel() // x.shape[1], 1) if case.rank_weighted else 1
    s, c = moments.parts(want), x.shape[1]
    d = x.double() - reference._per_channel(s.shift, x)
    terms = torch.cat([per_channel(d.abs()), per_channel(d.square())]) / divisor
    assert_values_close(got[c : 3 * c] / terms.clamp(min=1), want[c : 3 * c] / terms.clamp(min=1), SUM_TOLERANCE[x.dtype], "stats")
    assert torch.allclose(got[:c], s.shift, rtol=0, atol=0, equal_nan=True), f"shift: {got[:c]} instead of {s.shift}"
    (mean, var, _), (want_mean, want_var, _) = reference.finalize(got, 0.0), reference.finalize(want, 0.0)
    # Sums of deviations keep their digits; float64 still loses some to the square of the mean's distance from the shift.
    assert_values_close(mean, want_mean, SUM_TOLERANCE[x.dtype], "mean")
    assert_values_close(var, want_var, SUM_TOLERANCE[x.dtype], "var", (want_mean - s.shift).square() * 1e-15 / SUM_TOLERANCE[x.dtype])
    assert torch.equal(got[3 * c :], want[3 * c :]), f"weight, samples, tags: {got[3 * c :]} instead of {want[3 * c :]}"


def check_normalize(ops: Any, case: Case, device: str = "cpu") -> None:
    d = make(case, device)
    state = (d.running_mean, d.running_var, d.tracked)
    how = (case.momentum, case.unbiased, EPS, case.fused, SLOPE)
    alarm = Alarm(case, device)
    wanted = [None if t is None else t.clone().to(torch.float64 if t.is_floating_point() else t.dtype) for t in state]
    want_y, want_mask = reference.normalize(d.x.double(), d.stats, *map(doubled, (d.weight, d.bias, d.residual)), *wanted, *how)
    y, mask = ops.normalize(d.x, d.stats, d.weight, d.bias, d.residual, *state, *how, *alarm.arguments)
    alarm.check()
    assert y.dtype == case.dtype and (not case.channels_last or is_channels_last(y))
    assert_values_close(y, want_y, case.tolerance(VALUE_TOLERANCE), "y")
    for name, got, want in zip(("running_mean", "running_var"), state, wanted, strict=False):
        if got is not None and want is not None:
            assert_values_close(got, want, case.tolerance(VALUE_TOLERANCE, got.dtype), name)
    assert int(d.tracked) == int(wanted[2]), "num_batches_tracked"
    assert mask.shape == want_mask.shape, "mask"
    if case.keeps_mask:
        got_bits, want_bits = reference._unpack_bits(mask, d.x), reference._unpack_bits(want_mask, d.x)
        z, _ = reference.normalize(
            d.x.double(), d.stats, *map(doubled, (d.weight, d.bias, d.residual)), None, None, None, 0.1, True, EPS, Activation.none, SLOPE
        )
        # The sign of a z that is 0 within its rounding is undecided: of 25 million values that happens to one or two.
        wrong = (got_bits != want_bits) & ~(z.abs() <= case.tolerance(VALUE_TOLERANCE, reference.acc_type(case.dtype)))
        assert not wrong.any(), f"mask: {int(wrong.sum())} bits differ"


def check_backward_reduce(ops: Any, case: Case, device: str = "cpu") -> None:
    d = make(case, device)
    sums, dweight, dbias = ops.backward_reduce(*backward_arguments(d, case, as_is), TAG)
    want_sums, want_dweight, want_dbias = reference.backward_reduce(*backward_arguments(d, case, doubled), TAG)
    assert sums.dtype == torch.float64
    mean, _, invstd = reference.finalize(d.stats, EPS)
    xhat = (d.x.double() - reference._per_channel(mean, d.x)) * reference._per_channel(invstd, d.x)
    terms = torch.cat([per_channel(d.dy.double().abs()), per_channel((d.dy.double() * xhat).abs())])
    c = d.x.shape[1]
    assert_values_close(sums[: 2 * c], want_sums[: 2 * c], case.tolerance(SUM_TOLERANCE), "sums", terms)
    assert torch.equal(sums[2 * c :], want_sums[2 * c :]), f"tags: {sums[2 * c :]} instead of {want_sums[2 * c :]}"
    for name, got, want, of, scale in (
        ("dweight", dweight, want_dweight, d.weight, terms[c:]),
        ("dbias", dbias, want_dbias, d.bias, terms[:c]),
    ):
        assert got.dtype == (case.dtype if of is None else of.dtype)
        if of is not None:
            assert_values_close(got, want, max(VALUE_TOLERANCE[of.dtype], case.tolerance(SUM_TOLERANCE)), name, scale)


def check_backward_input(ops: Any, case: Case, device: str = "cpu") -> None:
    d = make(case, device)
    alarm = Alarm(case, device)
    dx, dz = ops.backward_input(*backward_arguments(d, case, as_is, d.sums), case.rank_weighted, *alarm.arguments)
    alarm.check()
    want_dx, want_dz = reference.backward_input(*backward_arguments(d, case, doubled, d.sums), case.rank_weighted)
    assert dx.dtype == dz.dtype == case.dtype and (not case.channels_last or is_channels_last(dx))
    # dx may be much smaller than its terms, which cancel in a small batch: they are as large as weight * invstd.
    assert_values_close(dx, want_dx, case.tolerance(VALUE_TOLERANCE), "dx", 10.0)
    assert_values_close(dz, want_dz, case.tolerance(VALUE_TOLERANCE), "dz")


def check_moved_all_the_way(ops: Any, device: str = "cpu") -> None:
    """With momentum 1, and in the first step of a cumulative average, the moving statistics are the batch's, however small
    they are compared with those before."""
    x = 1e-8 * torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).to(device)
    stats = reference.stats(x.double(), False, True)
    mean, var, _ = reference.finalize(stats, 0.0)
    for momentum in (1.0, None):
        state = (torch.ones(5, device=device), torch.ones(5, device=device), torch.tensor(0, device=device))
        ops.normalize(x, stats, None, None, None, *state, momentum, False, EPS, Activation.none, SLOPE)
        assert torch.equal(state[0], mean.float()) and torch.allclose(state[1], var.float(), rtol=2e-7, atol=0), momentum


CHECKS = {
    "stats": check_stats,
    "normalize": check_normalize,
    "backward_reduce": check_backward_reduce,
    "backward_input": check_backward_input,
}
