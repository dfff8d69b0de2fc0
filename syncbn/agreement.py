"""Do all ranks mean the same exchange? A record that each of them compares, before tensors are added that have nothing in common.

    first     (default) the first time that a layer exchanges in a group, in each direction
    always    every time: to find where a run diverges later on
    off       never

Set by SYNCBN_CHECK. One all-reduce of 256 bytes for each rank and one more, of the same size whatever the ranks are about to do: each
puts its record into its own row. Nothing is compared while tracing or capturing a graph.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .comm import Communicator

BYTES = 192  # of a record
ASIDE = 64  # bytes of what is said beside it


class RankMismatchError(RuntimeError):
    """The ranks of a group are about to exchange different things. Raised on every rank, and says what each was doing."""


# For each group the number of records compared in it so far: a rank that has skipped a layer is at another position.
_positions: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def compare(comm: Communicator, record: str, aside: str, device: torch.device) -> None:
    """Returns if `record` is the same on every rank; else raises RankMismatchError on every rank.

    `aside` may differ, as the shapes of the ranks' inputs do: the error says it, too.
    """
    position = _positions[comm.group] = _positions.get(comm.group, 0) + 1
    record = f"{record}, exchange {position} of this group"
    # An odd number of bytes: where a rank adds something else meanwhile, float64 numbers, it is never of this size, and gloo notices.
    table = torch.zeros(comm.world_size * (BYTES + ASIDE) + 1, dtype=torch.uint8)
    table[:-1].view(comm.world_size, -1)[comm.rank] = torch.cat([_encode(record, BYTES), _encode(aside, ASIDE)])
    rows = comm.all_reduce_(table.to(device)).cpu()[:-1].view(comm.world_size, -1).split([BYTES, ASIDE], dim=1)
    records, asides = ([_decode(row) for row in column] for column in rows)
    if len(set(records)) == 1:
        return
    ranks: dict[str, list[str]] = {}
    for rank, said in enumerate(zip(records, asides, strict=True)):
        ranks.setdefault(", ".join(filter(None, said)), []).append(str(rank))
    doing = "".join(f"\n  {'rank' if len(who) == 1 else 'ranks'} {', '.join(who)}: {what}" for what, who in ranks.items())
    raise RankMismatchError(f"the ranks are about to exchange different things:{doing}")


def _encode(text: str, size: int) -> Tensor:
    data = text.encode()
    if len(data) > size:  # the end says more than the middle: names differ in their last parts
        data = data[: size // 4] + b"..." + data[-(size - size // 4 - 3) :]
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)


def _decode(row: Tensor) -> str:
    return row.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
