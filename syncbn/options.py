"""A layer's settings: everything that the arithmetic needs besides tensors and ranks."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .activation import parse
from .comm.identity import described

WEIGHTINGS = ("samples", "ranks")


class Epilogue(NamedTuple):
    """Three adjacent arguments of every op but `stats`, in this order: what `normalize` applies after the statistics, and what the
    backward ops differentiate."""

    eps: float
    activation: int  # an `Activation`; torch takes three times as long to pass an enumeration's member to an op as to pass an int
    negative_slope: float  # of leaky_relu


class Options(NamedTuple):
    """Validated settings. `options_of` makes them."""

    momentum: float | None  # None for the cumulative average
    epilogue: Epilogue
    weighting: str
    rank_weighted: bool  # weighting is "ranks"
    unbiased: bool
    name: str  # in logs and profiles
    layer: str  # how messages begin: `comm.identity.description_of`


def options_of(
    momentum: float | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    weighting: str,
    unbiased: bool,
    layer: tuple[str | None, str, int] | None = None,
) -> Options:
    """The options that these values make. `layer` is the name, class and number of channels of the layer that has them; None for a
    function call.

    Raises:
        ValueError: an unknown activation or weighting, or a negative eps.
    """
    values = momentum, eps, activation, negative_slope, weighting, unbiased, layer
    if torch.compiler.is_dynamo_compiling():  # which would warn that it does not trace a cache
        return _options.__wrapped__(*values)
    try:
        return _options(*values)
    except TypeError:  # a value that cannot be hashed
        return _options.__wrapped__(*values)


# A layer has the same values at nearly every call, and its texts alone cost as much as an op. The cache is by value, so that no entry
# becomes invalid.
@functools.lru_cache(4096)
def _options(
    momentum: float | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    weighting: str,
    unbiased: bool,
    layer: tuple[str | None, str, int] | None,
) -> Options:
    name, description = ("sync_batch_norm",) * 2 if layer is None else (layer[0] or layer[1], described(*layer))
    try:
        number = parse(activation)
    except ValueError as error:
        raise ValueError(f"{description}: {error}") from None
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{description}: weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    if not eps >= 0:  # nor NaN
        raise ValueError(f"{description}: eps must not be negative, got {eps}")
    epilogue = Epilogue(float(eps), int(number), float(negative_slope))
    return Options(momentum, epilogue, weighting, weighting == "ranks", unbiased, name, description)
