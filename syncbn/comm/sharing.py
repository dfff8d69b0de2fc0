"""How the ranks of a group exchange CPU tensors: in shared memory if they can, else over the group.

    one host         in its memory
    several hosts    sums in each host's memory ──► the hosts' first ranks over a group of their own ──► results in each host's memory
    else             over the group, with a tag in the payload

Every eager exchange is verified, not only first ones, unless SYNCBN_CHECK=off: no rank uses a sum to which another has added something
else. In memory the ranks compare digests before they add. Over a group the sums carry each rank's tag t and t * t: if the sums over R
ranks are R * t and R * t * t, then the sum of (t_i - t)^2 is 0, and all ranks have sent t. Two exchanges have the same tag once
in a million. Every rank gets the same sums, so if the test fails on one rank it fails on all, and all raise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import environment
from . import agreement
from .meeting import meet
from .shared_memory import Mismatch, SharedMemory
from .signatures import Ticket, digest_of, sums_of_tags, tag_of
from .way import Key, MemoryOrGroup, expected, tag

if TYPE_CHECKING:
    from . import Communicator


class Sharing(MemoryOrGroup):
    """The shared memory of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts = 1
        self.timeout = 0.0
        self.memory: SharedMemory | None = None
        self.first_ranks: Communicator | None = None  # the group of the hosts' first ranks; None on any other rank, or with one host

    def _memory_in_words(self) -> str:
        if self.hosts == 1:
            return "in shared memory"
        return f"in shared memory on each of {self.hosts} hosts, whose first ranks use a group of their own"

    def _meet(self, comm: Communicator, device: torch.device) -> None:
        """Raises RankMismatchError, on every rank, if the ranks differ in SYNCBN_CHECK: their exchanges would not match."""
        check = f"first exchange of the group, SYNCBN_CHECK={environment.settings.check}"
        agreement.verify(comm, check, "", device)
        ranks, self.memory = meet(lambda row: agreement.gather(comm, row, device), comm.rank, comm.world_size)
        self.hosts, self.timeout = len(ranks), comm.timeout
        self.in_one_memory = self.memory is not None and self.hosts == 1
        if self.hosts > 1:
            self.first_ranks = comm.among([host[0] for host in ranks])

    def ticket(self, comm: Communicator, key: Key) -> Ticket:
        return Ticket(tag(comm, key))

    def all_reduce_(self, comm: Communicator, tensor: Tensor, channels: int, key: Key) -> Tensor:
        if self.in_one_memory:
            assert self.memory is not None
            return self.memory.all_reduce_(tensor, expected(key), self.timeout, channels)
        if self.reason and environment.settings.check == "off":
            return super().all_reduce_(comm, tensor, channels, key)
        shifts, payload = tensor[:channels], tensor[channels:]  # the shifts are 0 on all ranks
        if self.reason:
            total = checked(comm.all_reduce_(payload), comm.world_size, expected(key))
        else:
            total = self._over_hosts(comm, payload, expected(key))
        return torch.cat([shifts, total]) if channels else total

    def _over_hosts(self, comm: Communicator, payload: Tensor, digest: int) -> Tensor:
        mismatch: Mismatch | None = None
        if self.memory is not None:
            try:
                self.memory.all_reduce_(payload, digest, self.timeout)
            except Mismatch as error:  # the other hosts learn of it from the NaN
                mismatch = error
                payload[-2:] = torch.nan
        if self.first_ranks is not None:
            self._add_over_hosts(payload)
        if mismatch is not None:
            raise mismatch
        if self.memory is not None:
            if self.first_ranks is None:
                payload.zero_()
            self.memory.all_reduce_(payload, _RESULTS, self.timeout)
        return checked(payload, comm.world_size, digest)

    def _add_over_hosts(self, payload: Tensor) -> None:
        """Adds `payload` over the hosts, in place, on the first rank of each."""
        assert self.first_ranks is not None
        try:
            self.first_ranks.all_reduce_(payload)
        except BaseException:
            if self.memory is not None:
                self.memory.abandon()
            raise
        payload += 0.0  # -0.0 becomes 0.0, as where other ranks of the host add zeros: all hosts get the same bits


_RESULTS = digest_of("the sums of all hosts")


def checked(payload: Tensor, ranks: int, digest: int) -> Tensor:
    """`payload`. Raises Mismatch, on every rank, if the ranks' tags differ."""
    if tuple(payload[-2:].tolist()) != sums_of_tags(ranks, tag_of(digest, ranks)):
        raise Mismatch
    return payload
