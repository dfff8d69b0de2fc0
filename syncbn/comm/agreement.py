"""Checks, before tensors are summed, that all ranks are about to run the same exchange.

SYNCBN_CHECK says when ranks that do not exchange in one memory compare whole signatures:

    first     (default) at a layer's first exchange in a group, in each direction
    always    at every exchange, to find where a run diverges later on
    off       never

With `first` and with `always`, every eager exchange outside syncbn.join is also verified, by a digest or by a tag (sharing.py, alarms.py).
No signatures are compared while a graph is traced or captured.

A comparison takes one all-reduce, of 24 R + 1 bytes for R ranks. It gathers each signature's digest and the length of the text that an
error would show. If the digests differ, a second all-reduce gathers these texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._torch_private import is_torchs_layer_replaced
from .identity import state_of

if TYPE_CHECKING:
    from . import Communicator

DIGEST, LENGTH = 16, 8  # bytes in a rank's row
LONGEST = 4096  # bytes of a signature and its details that an error shows


class RankMismatchError(RuntimeError):
    """The ranks of a group are about to exchange different things; the message lists what each was about to do. Or, on GPUs, they have
    exchanged different things; the message lists the exchanges. Raised on every rank."""


def verify(comm: Communicator, signature: str, details: str, device: torch.device) -> None:
    """Returns if `signature` and the number of earlier verifications are the same on every rank, and if all ranks have replaced torch's
    layer or none has; else raises RankMismatchError on every rank.

    `details`, such as the shapes of the inputs, may differ between ranks; only the error shows them.
    """
    state = state_of(comm.group)
    signature = f"{signature}, verification {state.verifications + 1} of this group"
    if is_torchs_layer_replaced():
        signature += ", torch.nn.SyncBatchNorm is replaced (SYNCBN_REPLACE_TORCH, which must be the same on all ranks)"
    text = _both_ends(f"{signature}; {details}" if details else signature)
    rows = gather(comm, hashlib.sha256(signature.encode()).digest()[:DIGEST] + len(text).to_bytes(LENGTH, "little"), device)
    state.verifications += 1
    if len({row[:DIGEST] for row in rows}) == 1:
        return
    longest = max(int.from_bytes(row[DIGEST:], "little") for row in rows)
    texts = gather(comm, text.ljust(min(longest, LONGEST), b"\0"), device)
    raise mismatch([row.rstrip(b"\0").decode(errors="replace") for row in texts])


def mismatch(texts: Sequence[str]) -> RankMismatchError:
    """The error that shows for each rank, in order, its signature and details."""
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(str(rank))
    lines = "".join(f"\n  {'rank' if len(same) == 1 else 'ranks'} {', '.join(same)}: {text}" for text, same in ranks.items())
    return RankMismatchError(f"the ranks are about to exchange different things:{lines}")


def gather(comm: Communicator, row: bytes, device: torch.device) -> list[bytes]:
    """Each rank's row, all of one length: the sum of tables in which each rank fills its own row."""
    # An odd byte count can never match a float64 tensor, so gloo detects a rank that sends sums instead.
    width = len(row) + len(row) % 2
    table = torch.zeros(comm.world_size * width + 1, dtype=torch.uint8, device="cpu")
    table[comm.rank * width :][: len(row)] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
    summed: Tensor = comm.all_reduce_(table.to(device)).cpu()
    return [bytes(part[: len(row)].tolist()) for part in summed[:-1].view(comm.world_size, width)]


def _both_ends(text: str) -> bytes:
    """The text, without its middle if it is longer than LONGEST bytes: layer names differ mostly in their last parts."""
    data = text.encode()
    if len(data) <= LONGEST:
        return data
    return data[: LONGEST // 4] + b"..." + data[-(LONGEST - LONGEST // 4 - 3) :]
