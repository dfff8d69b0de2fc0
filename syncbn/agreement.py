"""Do all ranks mean the same exchange? A record that each of them compares, before tensors are added that have nothing in common.

    first     (default) the first time that a layer exchanges in a group, in each direction
    always    every time: to find where a run diverges later on
    off       never

Set by SYNCBN_CHECK. One all-reduce of [world_size, 32] int64, of the same size whatever the ranks are about to do: each rank puts
its record into its own row. Nothing is compared while tracing or capturing a graph.
"""

from __future__ import annotations

import os
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .comm import Communicator

MODES = ("first", "always", "off")
BYTES = 256  # of a record, 32 int64


class RankMismatchError(RuntimeError):
    """The ranks of a group are about to exchange different things. Raised on every rank, and says what each was doing."""


# For each group the number of records compared in it so far: a rank that has skipped a layer is at another position.
_positions: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def mode() -> str:
    """SYNCBN_CHECK, or ValueError."""
    chosen = os.environ.get("SYNCBN_CHECK", "first")
    if chosen not in MODES:
        raise ValueError(f"SYNCBN_CHECK must be one of {MODES}, got {chosen!r}")
    return chosen


def compare(comm: Communicator, record: str, device: torch.device) -> None:
    """Returns if `record` is the same on every rank; else raises RankMismatchError on every rank."""
    position = _positions[comm.group] = _positions.get(comm.group, 0) + 1
    record = f"{record}, exchange {position} of this group"
    table = torch.zeros(comm.world_size, BYTES // 8, dtype=torch.int64)
    table[comm.rank] = _encode(record)
    records = [_decode(row) for row in comm.all_reduce_(table.to(device)).cpu()]
    if len(set(records)) == 1:
        return
    ranks: dict[str, list[str]] = {}
    for rank, other in enumerate(records):
        ranks.setdefault(other, []).append(str(rank))
    doing = "".join(f"\n  {'rank' if len(who) == 1 else 'ranks'} {', '.join(who)}: {what}" for what, who in ranks.items())
    raise RankMismatchError(f"the ranks are about to exchange different things:{doing}")


def _encode(record: str) -> Tensor:
    data = record.encode()
    if len(data) > BYTES:  # the end says more than the middle: names differ in their last parts
        data = data[: BYTES // 4] + b"..." + data[-(BYTES - BYTES // 4 - 3) :]
    return torch.frombuffer(bytearray(data.ljust(BYTES, b"\0")), dtype=torch.int64)


def _decode(row: Tensor) -> str:
    return row.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
