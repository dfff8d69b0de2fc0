"""The identity of an exchange: its signature in words, the digest of the signature, and the tag, which travels with the values."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

TAG_BITS = 20  # at most; the bindings take no more
TAGS = 2  # values at the end of a payload: the tag and its square


class Ticket(NamedTuple):
    """How an exchange is verified: the ops write the tag and its square at the end of their sums. If only the device sees the total,
    the op that uses it sets the alarm unless all `ranks` have sent this tag."""

    tag: int = 0
    ranks: int = 0
    alarm: Tensor | None = None


NO_TICKET = Ticket()


def signature(identity: str, kind: str, values: int, dtype: torch.dtype, weighting: str, eps: float, channels: int | None) -> str:
    """What a rank is about to exchange, equal on all ranks. `identity` is the layer's in the group; `values` does not count the tags."""
    return f"{kind} of {identity}, {size(values, channels)}, {dtype}, weighting {weighting}, eps {eps}"


def size(values: int, channels: int | None) -> str:
    return f"{values} values" if channels is None else f"{channels} channels"


@functools.lru_cache(4096)  # a model exchanges the same things in every step, and this takes half as long as an exchange in shared memory
def digest(*arguments: Any) -> int:
    """64 bits of `signature(*arguments)`."""
    return digest_of(signature(*arguments))


def digest_of(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


UNVERIFIED = digest_of("not compared: SYNCBN_CHECK=off")


def tag_of(digest: int, ranks: int) -> int:
    """The low bits of the digest, as many as let float64 hold the sum of `ranks` squares exactly: 20 for up to 8192 ranks."""
    bits = min(TAG_BITS, (53 - (ranks - 1).bit_length()) // 2)
    return digest & ((1 << bits) - 1)


def sums_of_tags(ranks: int, tag: int) -> tuple[float, float]:
    """The last two values of a payload after an exchange in which all ranks had this tag."""
    return float(ranks * tag), float(ranks * tag * tag)
