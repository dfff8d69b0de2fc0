"""A layer's settings: everything that the arithmetic needs besides tensors and ranks."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .activation import Activation, parse

WEIGHTINGS = ("samples", "ranks")


class Epilogue(NamedTuple):
    """The last arguments of the ops, in this order: what `normalize` applies after the statistics, and what the backward ops need to
    undo it."""

    eps: float
    activation: Activation
    negative_slope: float  # of leaky_relu


class Options(NamedTuple):
    """Validated settings. `options_of` makes them."""

    momentum: float | None  # None for the cumulative average
    epilogue: Epilogue
    weighting: str
    unbiased: bool
    name: str  # in logs and profiles
    layer: str  # how messages begin: `comm.identity.description_of`

    @property
    def rank_weighted(self) -> bool:
        return self.weighting == "ranks"


def options_of(
    momentum: float | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    weighting: str,
    unbiased: bool,
    name: str = "sync_batch_norm",
    layer: str = "sync_batch_norm",
) -> Options:
    """The options that these values make.

    Raises:
        ValueError: an unknown activation or weighting, or a negative eps.
    """
    values = momentum, eps, activation, negative_slope, weighting, unbiased, name, layer
    if torch.compiler.is_compiling():  # which would warn that it does not trace a cache
        return _options.__wrapped__(*values)
    try:
        return _options(*values)
    except TypeError:  # a value that cannot be hashed
        return _options.__wrapped__(*values)


@functools.lru_cache(4096)  # by value, so that it needs no invalidation: a layer has the same values at nearly every call
def _options(
    momentum: float | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    weighting: str,
    unbiased: bool,
    name: str,
    layer: str,
) -> Options:
    try:
        number = parse(activation)
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{layer}: weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    if not eps >= 0:  # nor NaN
        raise ValueError(f"{layer}: eps must not be negative, got {eps}")
    return Options(momentum, Epilogue(float(eps), number, float(negative_slope)), weighting, unbiased, name, layer)
