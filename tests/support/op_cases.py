"""The test cases shared by all compiled kernels: shapes, layouts, types and fusions, edges first. op_checks.py says what must hold."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support import layouts
from syncbn import moments, reference
from syncbn.activation import Activation, keeps_mask, keeps_residual

SHAPES = [
    (0, 3, 4),  # no samples
    (0, 11),  # no samples, and one value per sample and channel
    (2, 3, 0),  # samples without values
    (1, 1),  # a single value
    (5, 1),  # one channel
    (3, 2, 2),  # planes shorter than a byte of the mask
    (3, 5, 7),  # ... and across two bytes
    (7, 3, 9),  # planes of less than a vector for each lane
    (9, 70),  # bytes of the mask across tiles of 8 channels
    (6, 44),  # channels: a multiple of 4, not of 8
    (3, 7, 5, 11),  # primes: nothing divides a warp
    (2, 16, 7, 7),  # planes of odd length: one in eight begins at a multiple of 8
    (33, 24, 2, 2),  # 3 and 6 vectors of channels: idle lanes
    (2, 3, 4, 5, 6),  # three dimensions
    (70, 8, 3, 3),  # more planes than warps
    (37, 8, 7, 7),  # planes of 8, 16 or 32 lanes: several in a step, and steps that are not full
    (21, 8, 14, 14),  # planes of a whole warp or more, the last step not full
    (1200, 16),  # on one multiprocessor, more rows than one step of all blocks
    (40, 256),  # several tiles of channels, none of them shared
    (500, 128),  # several tiles of channels, on 7 multiprocessors each shared by several blocks
    (19, 520),  # more channels than a block is wide
    (1, 2, 40, 61),  # planes cut into pieces
    (2, 1, 97, 97),  # one channel over all blocks, odd planes in many pieces
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FUSIONS = [(activation, residual) for residual in (False, True) for activation in (activation.name for activation in Activation)]

# For values of about 1: a few roundings of the type of the computation (float32; float64 for float64), or one of the stored type.
VALUE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Of a sum, relative to the sum of the absolute values of its terms: float32 in a thread, float64 after.
SUM_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
EPS, SLOPE = 1e-3, 0.1
TAG, RANKS = 5, 2  # this rank's tag, and how many ranks should have sent it


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
    # The biases of the channels go from -reach to reach, and so does z: exp overflows and underflows there.
    reach: float = field(default=0.0, repr=False)
    tags: tuple[int, ...] | None = field(default=None, repr=False)  # what the ranks send; an op expects TAG from RANKS ranks
    # The statistics that the ops get: "others": of this rank and another; "alone": of this rank; "empty": all are 0; "negative": the
    # variance is negative.
    group: str = "others"

    def __str__(self) -> str:
        names = [str(self.shape).replace(" ", ""), "last" if self.channels_last else "first", str(self.dtype).removeprefix("torch.")]
        extra = [name for name in ("residual", "strided", "nan", "inf") if getattr(self, name)] + (
            [f"mean{self.mean:g}"] if self.mean > 1 else []
        )
        extra += [f"reach{self.reach:g}"] if self.reach else []
        tags = [] if self.tags is None else [f"tags{','.join(map(str, self.tags))}"]
        return "-".join([*names, self.activation, *extra, *tags, *([] if self.group == "others" else [self.group])])

    @property
    def fused(self) -> Activation:
        return Activation[self.activation]

    def tolerance(self, tolerances: dict[torch.dtype, float], dtype: torch.dtype | None = None) -> float:
        """For a result of this dtype. Depending on FMA contraction, Σx²/n - mean² is off by about mean² float64 roundings; no tighter
        bound is possible."""
        return max(tolerances[dtype or self.dtype], 0.0 if self.shifted else 2.0**-51 * self.mean**2)

    @property
    def keeps_mask(self) -> bool:
        return keeps_mask(self.fused, self.residual)


# What a case has besides shape, layout and dtype: the choices of each axis, a more frequent one written more than once. "own" is x's dtype.
AXES: dict[str, tuple] = {
    "fusion": tuple(FUSIONS),
    "weight": (torch.float32, "own", torch.float64, None),
    "bias": (torch.float32, "own", None),
    "running": (torch.float32, torch.float64, torch.bfloat16, torch.float16, None),
    "momentum": (0.1, None, 0.3),
    "unbiased": (True, True, True, False),
    "rank_weighted": (False, False, False, True),
    "shifted": (False, True),
}

ALWAYS = list(itertools.product(SHAPES, (False, True), DTYPES, range(2)))  # every shape in both layouts and every dtype, twice


def drawn(n: int) -> dict[str, Any]:
    """The choices of case n. They are drawn, the same in each run, so that no axis follows another."""
    return {axis: random.Random(f"{axis} {n}").choice(choices) for axis, choices in AXES.items()}


def table() -> list[Case]:
    """A new axis is one line in AXES, and a new choice one value."""
    cases = []
    for n, (shape, channels_last, dtype, _) in enumerate(ALWAYS):
        choices = {axis: dtype if isinstance(choice, str) else choice for axis, choice in drawn(n).items()}
        activation, residual = choices.pop("fusion")
        cases.append(Case(shape, channels_last, dtype, activation, residual, **choices))
    return cases + EXTREMES + FAR + TAGGED


EXTREMES = [
    # Nothing is counted or moved, and nothing becomes NaN
    Case((0, 3, 4), activation="relu", residual=True, group="empty"),
    Case((0, 11), activation="silu", momentum=None, rank_weighted=True, shifted=True, group="empty"),
    Case((2, 3, 0), True, torch.bfloat16, rank_weighted=True, group="empty"),
    Case((70, 8, 3, 3), dtype=torch.float64, activation="leaky_relu", residual=True, group="empty"),  # also when x itself is not empty
    Case((9, 70), True, torch.float64, momentum=None, rank_weighted=True, group="empty"),
    Case((1, 5), group="alone"),  # one sample has no unbiased variance
    Case((2, 5), momentum=None, group="alone"),
    Case((4, 3, 1), momentum=None, rank_weighted=True, group="alone"),
    Case((4, 3, 20, 25), dtype=torch.bfloat16, group="negative"),  # as Σx² / n - mean² is by rounding where all x are the same
    Case((40, 256), dtype=torch.float64, rank_weighted=True, group="negative"),
    Case((70, 8, 3, 3), dtype=torch.float64, momentum=0.0, nan=True),  # momentum 0 ignores the batch, NaN included
    Case((4, 3, 20, 25), mean=1e3, activation="relu"),  # sums of squares in float32 would leave no digit of the variance
    Case((300, 16), True, mean=1e3, residual=True, activation="relu"),
    Case((300, 9), mean=3e4),
    Case((4, 3, 20, 25), dtype=torch.float64, mean=1e3),
    Case((4, 3, 20, 25), dtype=torch.float64, mean=1e6),
    Case((4, 3, 20, 25), dtype=torch.float64, mean=1e8, shifted=True),  # sums about 0 would leave no digit of the variance
    Case((1, 2, 40, 61), dtype=torch.float64, mean=1e8, shifted=True, rank_weighted=True),
    Case((300, 16), True, torch.float64, mean=1e8, shifted=True, activation="relu", residual=True),
    Case((500, 128), True, torch.float64, mean=1e8, shifted=True),  # many blocks, and one shift
    Case((70, 8, 3, 3), activation="relu", residual=True, strided=True),
    Case((300, 16), True, torch.bfloat16, weight=torch.float64, bias=torch.bfloat16, running=torch.float16, momentum=None, strided=True),
    Case((70, 8, 3, 3), activation="relu", nan=True),  # NaN passes through relu, and stays in its channel
    Case((70, 8, 3, 3), True, torch.bfloat16, activation="leaky_relu", residual=True, nan=True),
    Case((4, 3, 20, 25), activation="relu", inf=True),  # relu blocks infinite gradients of zeroed outputs
    Case((300, 16), True, torch.bfloat16, activation="relu", residual=True, inf=True),
]

# The biases of neighbouring channels are 2 apart, so that some z is close to every threshold of exp in the type of the computation.
FAR = [
    Case(shape, last, dtype, *fusion, reach=800 if dtype is torch.float64 else 130)
    for fusion in FUSIONS
    for shape, last, dtype in (((3, 131, 5), False, torch.float32), ((7, 131), True, torch.bfloat16), ((3, 803), True, torch.float64))
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
    *(Case((0, 3, 4), tags=tags, group="empty") for tags in SENT_TAGS),  # a rank without samples verifies, too
    Case((0, 11), activation="silu", rank_weighted=True, tags=(TAG, 0), group="empty"),
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
    # The same values on every device; only those of a layer of real size are drawn on it, because on the CPU that takes seconds.
    where = device if math.prod(case.shape) > 1 << 20 else "cpu"
    generator = torch.Generator(where).manual_seed(zlib.crc32(repr(case).encode()))
    c = case.shape[1]

    def draw(shape: tuple[int, ...], dtype: torch.dtype | None, mean: float = 0.0) -> Tensor | None:
        return None if dtype is None else (torch.randn(shape, generator=generator, device=where) + mean).to(dtype)

    def like_x(wanted: bool = True, mean: float = 0.0) -> Tensor | None:
        t = draw(case.shape, case.dtype if wanted else None, mean)
        return t if t is None or not case.channels_last else layouts.channels_last(t)

    x, dy, residual = like_x(mean=case.mean), like_x(), like_x(case.residual)
    if case.nan:
        x[(0,) * x.dim()] = torch.nan
    weight, bias = draw((c,), case.weight, 0.5), draw((c,), case.bias)
    if case.reach:
        bias = torch.linspace(-case.reach, case.reach, c, device=where).to(case.bias)
    running_mean, running_var = draw((c,), case.running), draw((c,), case.running, 5.0)
    # The group has another rank, with 3 samples of its own: statistics are not those of x, and not empty.
    other = torch.randn((3, c), generator=generator, device=where, dtype=torch.float64) + case.mean
    stats = reference.stats(x.double(), case.rank_weighted, case.shifted)
    if case.group in ("others", "negative"):
        stats = moments.merge(stats, reference.stats(other, case.rank_weighted, case.shifted))
    if case.group == "empty":
        stats.zero_()
    if case.group == "negative":
        s = moments.parts(stats)
        s.sumsq.copy_(s.sum.square() / s.weight - 0.01 * s.weight)
    y, mask = reference.normalize(
        x.double(), stats, doubled(weight), doubled(bias), doubled(residual), None, None, None, 0.1, True, EPS, case.fused, SLOPE
    )
    mask = mask if case.keeps_mask else None
    _fill_tags(case, *moments.parts(stats)[-2:])
    if case.inf:
        dy[y == 0] = torch.inf
    tracked = torch.tensor(4)
    data = Data(x, dy, residual, weight, bias, running_mean, running_var, tracked, stats, mask, torch.empty(0))
    data.sums = reference.backward_reduce(*backward_arguments(data, case, doubled))[0] + F.pad(
        torch.randn(2 * c, generator=generator, device=where).double(), (0, moments.SUMS_TAIL)
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


def backward_arguments(d: Data, case: Case, of: Any, *sums: Tensor) -> tuple[Any, ...]:
    residual = d.residual if keeps_residual(case.fused, True) else None
    return (of(d.dy), *sums, of(d.x), d.stats, of(d.weight), of(d.bias), of(residual), d.mask, EPS, case.fused, SLOPE)


def as_is(t: Tensor | None) -> Tensor | None:
    return t
