"""How the ranks of a group exchange the tensors of a kind of device: in memory of theirs if they can, else over the group.

The first exchange finds out, on all ranks together: all use the memory, or none, and then all have the same reason.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from .. import environment
from .debug import log
from .meeting import Unusable

if TYPE_CHECKING:
    from typing_extensions import Self

    from . import Communicator


class Way(ABC):
    """That of one group. `GroupState.way` keeps it."""

    def __init__(self) -> None:
        self.reason = ""  # why the ranks exchange over the group
        self.ready = False
        self._lock = threading.Lock()  # two threads of a rank may reach the first exchange together

    @property
    def path(self) -> str:
        """How the ranks exchange, in words."""
        if not self.ready:
            return "not known before the first exchange"
        return f"over the group: {self.reason}" if self.reason else self._memory_in_words()

    def set_up(self, comm: Communicator, device: torch.device) -> Self:
        """Every rank calls it. While a graph is captured it does nothing: that exchange, and its replays, are the group's.

        Raises RankMismatchError, on every rank, if the ranks differ in what they must have in common."""
        with self._lock:
            if not self.ready and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                try:
                    self._meet(comm, device)
                except Unusable as why:
                    self.reason = str(why)
                self.ready = True
                if environment.settings.debug:
                    log().info("rank %d exchanges %s", comm.rank, self.path)
        return self

    @abstractmethod
    def _meet(self, comm: Communicator, device: torch.device) -> None:
        """Makes the memory. Every rank calls it. Raises Unusable, on every rank, if one of them cannot take part."""

    @abstractmethod
    def _memory_in_words(self) -> str: ...
