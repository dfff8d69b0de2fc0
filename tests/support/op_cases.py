"""What every compiled kernel is compared with the float64 reference on: shapes, layouts, types and fusions, edges first.

A check_OP takes `ops`, anything with the four ops as methods (torch.ops.syncbn, the emulated kernels), and one Case. Each op
gets its inputs from the reference, so that one op's error is not another's.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn import moments, reference
from syncbn.activation import Activation, keeps_mask, keeps_residual
from syncbn.layout import is_channels_last

SHAPES = [
    (0, 3, 4),  # no samples
    (0, 11),  # no samples, and one value per sample and channel
    (2, 3, 0),  # samples without values
    (1, 1),  # a single value
    (5, 1),  # one channel
    (3, 2, 2),  # planes shorter than a byte of the mask
    (3, 5, 7),  # ... and across two bytes
    (7, 3, 9),  # planes of less than a vector for each lane
    (9, 70),  # bytes of the mask across tiles of 32 channels
    (6, 44),  # channels: a multiple of 4, not of 8
    (3, 7, 5, 11),  # primes: nothing divides a warp
    (2, 16, 7, 7),  # odd planes, one channel a multiple of 8
    (33, 24, 2, 2),  # 3 and 6 vectors of channels: idle lanes
    (2, 3, 4, 5, 6),  # three dimensions
    (70, 8, 3, 3),  # more planes than warps
    (37, 8, 7, 7),  # planes of 8, 16 or 32 lanes: several in a step, and steps that are not full
    (21, 8, 14, 14),  # planes of a whole warp or more, the last step not full
    (1200, 16),  # more rows than one step of all blocks
    (40, 256),  # two blocks of which every thread has a sum to share
    (500, 128),  # more blocks in a group than rows in a block
    (19, 520),  # more channels than a block is wide
    (1, 2, 40, 61),  # planes cut into pieces, of odd length
    (2, 1, 97, 97),  # one channel over all blocks, odd planes in many pieces
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FUSIONS = [(activation, residual) for residual in (False, True) for activation in (activation.name for activation in Activation)]

# Of values about 1: a few roundings of what it is computed in (float32), or one of what it is stored in.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Of a sum, relative to the sum of the absolute values of its terms: float32 in a thread, float64 after.
SUM_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
EPS, SLOPE = 1e-3, 0.1
TAG, RANKS = 5, 2  # this rank's tag, and the ranks that should have sent it


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    activation: str = "none"
    residual: bool = False
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    running: torch.dtype | None = torch.float32
    momentum: float | None = 0.1
    unbiased: bool = True
    rank_weighted: bool = False
    shifted: bool = False
    mean: float = 0.7  # of x, whose standard deviation is about 1
    strided: bool = False  # weight, bias and the moving statistics are columns of matrices
    nan: bool = False  # the first value of x is NaN
    inf: bool = False  # dy is infinite where y is 0
    tags: tuple[int, ...] | None = field(default=None, repr=False)  # what the ranks have sent, of which TAG is this one's; None: unverified
    group: str = "others"  # whose statistics: also of "others", this rank "alone", "nobody" (all 0), or with a "negative" variance

    def __str__(self) -> str:
        names = [str(self.shape).replace(" ", ""), "last" if self.channels_last else "first", str(self.dtype).removeprefix("torch.")]
        extra = [name for name in ("residual", "strided", "nan", "inf") if getattr(self, name)] + (
            [f"mean{self.mean:g}"] if self.mean > 1 else []
        )
        tags = [] if self.tags is None else [f"tags{','.join(map(str, self.tags))}"]
        return "-".join([*names, self.activation, *extra, *tags, *([] if self.group == "others" else [self.group])])

    @property
    def fused(self) -> Activation:
        return Activation[self.activation]

    def tolerance(self, tolerances: dict[torch.dtype, float], dtype: torch.dtype | None = None) -> float:
        """Of a result of this dtype. About 0, Σx²/n - mean² has mean² roundings of float64 too many or too few, as a compiler fuses
        them or not: that is all that can be asked of two sums where the mean is that far from 0."""
        return max(tolerances[dtype or self.dtype], 0.0 if self.shifted else 2.0**-51 * self.mean**2)

    @property
    def keeps_mask(self) -> bool:
        return keeps_mask(self.fused, self.residual)


def table() -> list[Case]:
    """Every shape in both layouts and every type, with the fusions and types of the parameters taken in turn."""
    cases: list[Case] = []
    for shape in SHAPES:
        for channels_last in (False, True):
            for dtype in DTYPES:
                for _ in range(2):
                    n = len(cases)
                    activation, residual = FUSIONS[(n + n // 8) % len(FUSIONS)]
                    cases.append(Case(
                        shape, channels_last, dtype, activation, residual,
                        weight=(torch.float32, dtype, torch.float64, None)[n // 2 % 4], bias=(torch.float32, None, dtype)[n % 3],
                        running=(torch.float32, torch.float64, torch.bfloat16, torch.float16, None)[n % 5],
                        momentum=(0.1, None, 0.3)[n % 3], unbiased=n % 4 != 3, rank_weighted=n % 7 == 3, shifted=n % 2 == 1,
                    ))  # fmt: skip
    return cases + EXTREMES + TAGGED


EXTREMES = [
    # Nothing is counted or moved, and nothing becomes NaN
    Case((0, 3, 4), activation="relu", residual=True, group="nobody"),
    Case((0, 11), activation="silu", momentum=None, rank_weighted=True, shifted=True, group="nobody"),
    Case((2, 3, 0), True, torch.bfloat16, rank_weighted=True, group="nobody"),
    Case((70, 8, 3, 3), dtype=torch.float64, activation="leaky_relu", residual=True, group="nobody"),  # nor where x denies it
    Case((9, 70), True, torch.float64, momentum=None, rank_weighted=True, group="nobody"),
    Case((1, 5), group="alone"),  # one sample has no unbiased variance
    Case((2, 5), momentum=None, group="alone"),
    Case((4, 3, 1), momentum=None, rank_weighted=True, group="alone"),
    Case((4, 3, 20, 25), dtype=torch.bfloat16, group="negative"),  # as Σx² / n - mean² is by rounding where all x are the same
    Case((40, 256), dtype=torch.float64, rank_weighted=True, group="negative"),
    Case((70, 8, 3, 3), dtype=torch.float64, momentum=0.0, nan=True),  # what has no weight does not come in
    Case((4, 3, 20, 25), mean=1e3, activation="relu"),  # sums of squares in float32 would leave no digit of the variance
    Case((300, 16), True, mean=1e3, residual=True, activation="relu"),
    Case((300, 9), mean=3e4),
    Case((4, 3, 20, 25), dtype=torch.float64, mean=1e3),
    Case((4, 3, 20, 25), dtype=torch.float64, mean=1e6),
    Case((4, 3, 20, 25), dtype=torch.float64, mean=1e8, shifted=True),  # about 0, no digit of the variance would be left
    Case((1, 2, 40, 61), dtype=torch.float64, mean=1e8, shifted=True, rank_weighted=True),
    Case((300, 16), True, torch.float64, mean=1e8, shifted=True, activation="relu", residual=True),
    Case((500, 128), True, torch.float64, mean=1e8, shifted=True),  # many blocks, and one shift
    Case((70, 8, 3, 3), activation="relu", residual=True, strided=True),
    Case((300, 16), True, torch.bfloat16, weight=torch.float64, bias=torch.bfloat16, running=torch.float16, momentum=None, strided=True),
    Case((70, 8, 3, 3), activation="relu", nan=True),  # NaN passes through relu, and stays in its channel
    Case((70, 8, 3, 3), True, torch.bfloat16, activation="leaky_relu", residual=True, nan=True),
    Case((4, 3, 20, 25), activation="relu", inf=True),  # what relu has cut off does not come back
    Case((300, 16), True, torch.bfloat16, activation="relu", residual=True, inf=True),
]

# The ranks of an exchange are found to have sent one tag, or not, whatever x is.
SENT_TAGS = [
    (TAG, TAG),
    (TAG, TAG + 1),
    (4, 6),  # the sum of TAG twice, but not of its squares
    (1, 7),  # the other way round
    (TAG,),  # a rank is missing
    (TAG, TAG, TAG),  # or there is one too many
]
TAGGED = [
    *(Case((3, 5, 7), tags=tags) for tags in SENT_TAGS),
    *(Case((0, 3, 4), tags=tags, group="nobody") for tags in SENT_TAGS),  # a rank without samples verifies, too
    Case((0, 11), activation="silu", rank_weighted=True, tags=(TAG, 0), group="nobody"),
    Case((9, 70), True, torch.float64, activation="relu", residual=True, tags=(4, 6)),
    Case((37, 8, 7, 7), dtype=torch.bfloat16, activation="leaky_relu", residual=True, momentum=None, tags=(1, 7)),
    Case((500, 128), True, torch.bfloat16, activation="silu", residual=True, tags=(TAG, TAG)),
]


@dataclass
class Data:
    """The inputs of all four ops, on one device; what the ops give each other comes from the reference in float64."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    tracked: Tensor
    stats: Tensor
    mask: Tensor | None
    sums: Tensor


def doubled(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def make(case: Case, device: str = "cpu") -> Data:
    # The same values on every device; but a real layer is drawn where it is used, since float64 of it takes seconds on the CPU.
    where = device if math.prod(case.shape) > 1 << 20 else "cpu"
    random = torch.Generator(where).manual_seed(zlib.crc32(repr(case).encode()))
    c = case.shape[1]

    def draw(shape: tuple[int, ...], dtype: torch.dtype | None, mean: float = 0.0) -> Tensor | None:
        return None if dtype is None else (torch.randn(shape, generator=random, device=where) + mean).to(dtype)

    def like_x(wanted: bool = True, mean: float = 0.0) -> Tensor | None:
        t = draw(case.shape, case.dtype if wanted else None, mean)
        return t if t is None or not case.channels_last else t.movedim(1, -1).contiguous().movedim(-1, 1)

    x, dy, residual = like_x(mean=case.mean), like_x(), like_x(case.residual)
    if case.nan:
        x[(0,) * x.dim()] = torch.nan
    weight, bias = draw((c,), case.weight, 0.5), draw((c,), case.bias)
    running_mean, running_var = draw((c,), case.running), draw((c,), case.running, 5.0)
    # The group has another rank, with 3 samples of its own: statistics are not those of x, and not empty.
    other = torch.randn((3, c), generator=random, device=where, dtype=torch.float64) + case.mean
    stats = reference.stats(x.double(), case.rank_weighted, case.shifted)
    if case.group in ("others", "negative"):
        stats = moments.merge(stats, reference.stats(other, case.rank_weighted, case.shifted))
    if case.group == "nobody":
        stats.zero_()
    if case.group == "negative":
        s = moments.parts(stats)
        s.sumsq.copy_(s.sum.square() / s.weight - 0.01 * s.weight)
    y, mask = reference.normalize(
        x.double(), stats, doubled(weight), doubled(bias), doubled(residual), None, None, None, 0.1, EPS, True, case.fused, SLOPE
    )
    mask = mask if case.keeps_mask else None
    _fill_tags(case, *moments.parts(stats)[-2:])
    if case.inf:
        dy[y == 0] = torch.inf
    tracked = torch.tensor(4)
    data = Data(x, dy, residual, weight, bias, running_mean, running_var, tracked, stats, mask, torch.empty(0))
    data.sums = reference.backward_reduce(*_backward_arguments(data, case, doubled))[0] + F.pad(
        torch.randn(2 * c, generator=random, device=where).double(), (0, moments.SUMS_TAIL)
    )
    _fill_tags(case, *moments.parts_of_sums(data.sums)[-2:])
    for name, value in vars(data).items():
        setattr(data, name, None if value is None else value.to(device))
    for name in ("weight", "bias", "running_mean", "running_var") if case.strided else ():
        vector = getattr(data, name)
        setattr(data, name, torch.stack([vector, torch.full_like(vector, 9)], 1)[:, 0])
    return data


def _fill_tags(case: Case, tag_sum: Tensor, tag_squared_sum: Tensor) -> None:
    """What the ranks' tags and their squares add up to."""
    tag_sum.fill_(sum(case.tags or ()))
    tag_squared_sum.fill_(sum(tag * tag for tag in case.tags or ()))


class Alarm:
    """The arguments of an op that verifies the ranks' tags, and what must have become of its alarm."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.holds = case.tags == (TAG,) * RANKS
        # It must not be reset either, so it begins with another value where it must stay.
        self.word = torch.tensor([7 if self.holds else 0], dtype=torch.int32)
        if device == "cuda":
            self.word = self.word.pin_memory()

    @property
    def arguments(self) -> tuple[Any, ...]:
        return () if self.case.tags is None else (TAG, RANKS, self.word)

    def check(self) -> None:
        if self.word.is_pinned():
            torch.cuda.synchronize()
        if self.case.tags is not None:
            assert self.word.tolist() == [7 if self.holds else 1], f"alarm: {self.word.tolist()} for the tags {self.case.tags}"


def _backward_arguments(d: Data, case: Case, of: Any, *sums: Tensor) -> tuple[Any, ...]:
    residual = d.residual if keeps_residual(case.fused, True) else None
    return (of(d.dy), of(d.x), d.stats, *sums, of(d.weight), of(d.bias), of(residual), d.mask, EPS, case.fused, SLOPE)


def as_is(t: Tensor | None) -> Tensor | None:
    return t


# ---- One check for each op ------------------------------------------------------------------------------------------------------


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str, scale: Tensor | float = 0.0) -> None:
    """|got - want| <= tolerance * max(|want|, scale, 1), and NaN only where NaN is wanted."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    bound = tolerance * torch.maximum(want.abs(), torch.as_tensor(scale, dtype=want.dtype, device=want.device).expand_as(want)).clamp(min=1)
    wrong = ~((got.double() - want).abs() <= bound) & ~(got.isnan() & want.isnan())
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        first = f"{got[tuple(where)]} instead of {want[tuple(where)]} at {where}"
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first {first}")


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
    assert_close(got[c : 3 * c] / terms.clamp(min=1), want[c : 3 * c] / terms.clamp(min=1), SUM_TOLERANCE[x.dtype], "stats")
    assert torch.allclose(got[:c], s.shift, rtol=0, atol=0, equal_nan=True), f"shift: {got[:c]} instead of {s.shift}"
    (mean, var, _), (want_mean, want_var, _) = reference.finalize(got, 0.0), reference.finalize(want, 0.0)
    # Sums of deviations keep their digits whatever the mean; in float64 the square of its distance from the shift costs what it costs.
    assert_close(mean, want_mean, SUM_TOLERANCE[x.dtype], "mean")
    assert_close(var, want_var, SUM_TOLERANCE[x.dtype], "var", (want_mean - s.shift).square() * 1e-15 / SUM_TOLERANCE[x.dtype])
    assert torch.equal(got[3 * c :], want[3 * c :]), f"weight, samples, tags: {got[3 * c :]} instead of {want[3 * c :]}"


def check_normalize(ops: Any, case: Case, device: str = "cpu") -> None:
    d = make(case, device)
    state = (d.running_mean, d.running_var, d.tracked)
    how = (case.momentum, EPS, case.unbiased, case.fused, SLOPE)
    alarm = Alarm(case, device)
    wanted = [None if t is None else t.clone().to(torch.float64 if t.is_floating_point() else t.dtype) for t in state]
    want_y, want_mask = reference.normalize(d.x.double(), d.stats, *map(doubled, (d.weight, d.bias, d.residual)), *wanted, *how)
    y, mask = ops.normalize(d.x, d.stats, d.weight, d.bias, d.residual, *state, *how, *alarm.arguments)
    alarm.check()
    assert y.dtype == case.dtype and (not case.channels_last or is_channels_last(y))
    assert_close(y, want_y, case.tolerance(TOLERANCE), "y")
    for name, got, want in zip(("running_mean", "running_var"), state, wanted, strict=False):
        if got is not None and want is not None:
            assert_close(got, want, case.tolerance(TOLERANCE, got.dtype), name)
    assert int(d.tracked) == int(wanted[2]), "num_batches_tracked"
    assert mask.shape == want_mask.shape, "mask"
    if case.keeps_mask:
        got_bits, want_bits = reference._unpack_bits(mask, d.x), reference._unpack_bits(want_mask, d.x)
        z, _ = reference.normalize(
            d.x.double(), d.stats, *map(doubled, (d.weight, d.bias, d.residual)), None, None, None, 0.1, EPS, True, Activation.none, SLOPE
        )
        # The sign of a z that is 0 within its rounding is undecided: of 25 million values that happens to one or two.
        wrong = (got_bits != want_bits) & ~(z.abs() <= case.tolerance(TOLERANCE, reference.acc_type(case.dtype)))
        assert not wrong.any(), f"mask: {int(wrong.sum())} bits differ"


def check_backward_reduce(ops: Any, case: Case, device: str = "cpu") -> None:
    d = make(case, device)
    sums, dweight, dbias = ops.backward_reduce(*_backward_arguments(d, case, as_is), TAG)
    want_sums, want_dweight, want_dbias = reference.backward_reduce(*_backward_arguments(d, case, doubled), TAG)
    assert sums.dtype == torch.float64
    mean, _, invstd = reference.finalize(d.stats, EPS)
    xhat = (d.x.double() - reference._per_channel(mean, d.x)) * reference._per_channel(invstd, d.x)
    terms = torch.cat([per_channel(d.dy.double().abs()), per_channel((d.dy.double() * xhat).abs())])
    c = d.x.shape[1]
    assert_close(sums[: 2 * c], want_sums[: 2 * c], case.tolerance(SUM_TOLERANCE), "sums", terms)
    assert torch.equal(sums[2 * c :], want_sums[2 * c :]), f"tags: {sums[2 * c :]} instead of {want_sums[2 * c :]}"
    for name, got, want, of, scale in (
        ("dweight", dweight, want_dweight, d.weight, terms[c:]),
        ("dbias", dbias, want_dbias, d.bias, terms[:c]),
    ):
        assert got.dtype == (case.dtype if of is None else of.dtype)
        if of is not None:
            assert_close(got, want, max(TOLERANCE[of.dtype], case.tolerance(SUM_TOLERANCE)), name, scale)


def check_backward_input(ops: Any, case: Case, device: str = "cpu") -> None:
    d = make(case, device)
    alarm = Alarm(case, device)
    dx, dz = ops.backward_input(*_backward_arguments(d, case, as_is, d.sums), case.rank_weighted, *alarm.arguments)
    alarm.check()
    want_dx, want_dz = reference.backward_input(*_backward_arguments(d, case, doubled, d.sums), case.rank_weighted)
    assert dx.dtype == dz.dtype == case.dtype and (not case.channels_last or is_channels_last(dx))
    # The terms of dx are as large as weight * invstd, and of a small batch the sums are of that size, too.
    assert_close(dx, want_dx, case.tolerance(TOLERANCE), "dx", 10.0)
    assert_close(dz, want_dz, case.tolerance(TOLERANCE), "dz")


def check_moved_all_the_way(ops: Any, device: str = "cpu") -> None:
    """Where momentum is 1, and in the first step of a cumulative average, the moving statistics are the batch's: to half an ulp,
    however small they are beside those before."""
    x = 1e-8 * torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).to(device)
    stats = reference.stats(x.double(), False, True)
    mean, var, _ = reference.finalize(stats, 0.0)
    for momentum in (1.0, None):
        state = (torch.ones(5, device=device), torch.ones(5, device=device), torch.tensor(0, device=device))
        ops.normalize(x, stats, None, None, None, *state, momentum, EPS, False, Activation.none, SLOPE)
        assert torch.equal(state[0], mean.float()) and torch.allclose(state[1], var.float(), rtol=2e-7, atol=0), momentum


CHECKS = {
    "stats": check_stats,
    "normalize": check_normalize,
    "backward_reduce": check_backward_reduce,
    "backward_input": check_backward_input,
}
