"""How the ranks of a group exchange the tensors on one kind of device: in memory that they share if they can, else over the group.

    OVER_THE_GROUP    inside syncbn.join, which verifies nothing
    Sharing           CPU tensors, in shared memory: sharing.py
    PeerExchange      CUDA tensors, in each other's memory: peers.py

A group's first exchange of such tensors that is eager, not captured and outside syncbn.join decides this on all ranks together: all use
the memory, or none, and then all have the same reason.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import environment
from .debug import log
from .meeting import Unusable
from .signatures import NO_TICKET, UNVERIFIED, Ticket, digest, tag_of

if TYPE_CHECKING:
    from . import Communicator

Key = tuple[Any, ...]  # the arguments of `signatures.signature`: what an exchange is


class Way:
    """The group's communicator adds. The ranks verify nothing."""

    ready = True
    in_one_memory = False  # whether all ranks share one memory, in which they compare digests and merge statistics about different shifts

    @property
    def path(self) -> str:
        """How the ranks exchange, in words."""
        return "over the group"

    def set_up(self, comm: Communicator, device: torch.device) -> None:
        """Every rank calls it, until it is `ready`. Raises RankMismatchError, on every rank, if the ranks differ in what they must have
        in common."""

    def ticket(self, comm: Communicator, key: Key) -> Ticket:
        """How an exchange that is not `in_one_memory` is verified."""
        return NO_TICKET

    def check(self) -> None:
        """Raises the error that a device has found in an earlier exchange. Does not wait for the device."""

    def all_reduce_(self, comm: Communicator, tensor: Tensor, channels: int, key: Key) -> Tensor:
        """`Communicator.all_reduce_stats_` if `channels` is not 0, else `all_reduce_`. Raises Mismatch, on every rank, if the ranks do
        not exchange the same and this process can know it."""
        return comm.all_reduce_stats_(tensor, channels) if channels else comm.all_reduce_(tensor)

    def verify(self, key: Key, sums: Tensor, ticket: Ticket) -> None:
        """Verifies `sums` [2], those of a tag and its square, for an exchange whose values no op uses."""


OVER_THE_GROUP = Way()


class MemoryOrGroup(Way, ABC):
    """The ranks of one group exchange in memory that they share, or over the group. `GroupState.way` keeps the object."""

    def __init__(self) -> None:
        self.reason = ""  # why the ranks exchange over the group
        self.ready = False
        self._lock = threading.Lock()  # two threads of a rank may reach the first exchange together

    @property
    def path(self) -> str:
        if not self.ready:
            return "not known before the first exchange"
        return f"over the group: {self.reason}" if self.reason else self._memory_in_words()

    def set_up(self, comm: Communicator, device: torch.device) -> None:
        """While a graph is captured it does nothing: the captured exchange, and its replays, go over the group."""
        with self._lock:
            if self.ready or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                return
            try:
                self._meet(comm, device)
            except Unusable as why:
                self.reason = str(why)
            self.ready = True
            if environment.settings.debug:
                log().info("rank %d exchanges %s", comm.rank, self.path)

    @abstractmethod
    def _meet(self, comm: Communicator, device: torch.device) -> None:
        """Makes the memory. Every rank calls it. Raises Unusable, on every rank, if one of them cannot take part."""

    @abstractmethod
    def _memory_in_words(self) -> str: ...


def expected(key: Key) -> int:
    """The digest that every rank must have in this exchange. It is the same in all exchanges if the ranks compare nothing."""
    return digest(*key) if environment.settings.check != "off" else UNVERIFIED


def tag(comm: Communicator, key: Key) -> int:
    """The tag of a payload, which says what the exchange is."""
    return tag_of(expected(key), comm.world_size)
