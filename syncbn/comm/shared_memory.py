"""Memory that all ranks of a host have mapped. A sum over the ranks takes microseconds there; a collective takes hundreds.

The protocol is in csrc/cpu/shared_memory.h: every rank publishes its values and waits for the others in compiled code, without the
GIL, in slices of 50 ms. Between slices this file handles signals and the timeout, and checks whether the other ranks are alive. Before any
value is added, each rank has compared what all of them are about to exchange.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
import time
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from .. import native
from .failures import Incomplete

with suppress(ImportError):  # Windows has no fcntl, and no compiled side either
    import fcntl

ALL_READ_ALL = 8  # up to this many ranks, each of them reads all slots; with more, each adds one segment

_DONE, _WAITING, _MISMATCH, _ABANDONED, _FORKED = range(5)
_ARRIVED, _LATE, _ENDED, _GAVE_UP = range(4)


class Forked(RuntimeError):
    """This process is a fork of the one that took part in the exchanges."""


class SharedExchangeError(Incomplete):
    """An exchange in shared memory cannot be completed. The message says which rank is missing and whether its process is alive, which
    rank has given up, or that another thread of this process is exchanging."""


class Mismatch(Exception):
    """The ranks do not exchange the same. Every rank gets this."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled side; None if it was not built or not loaded."""
    cpu = native.status()[0]
    if not cpu.loaded:
        return None
    functions = ctypes.CDLL(str(cpu.path))
    if not hasattr(functions, "syncbn_shared_all_reduce"):
        return None
    address, rank = ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("all_reduce", ctypes.c_int64, [address, rank, address, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64]),
        ("bytes", ctypes.c_int64, [rank]),
        ("slots_offset", ctypes.c_int64, [rank]),
        ("create", None, [address, rank, ctypes.c_int]),
        ("join", None, [address, rank, ctypes.c_uint64]),
        ("random_of", ctypes.c_uint64, [address, rank]),
        ("start", None, [address, rank]),
        ("abandon", None, [address, rank]),
        ("presence", ctypes.c_int64, [address, rank, rank, ctypes.c_int]),
    ):
        function = getattr(functions, f"syncbn_shared_{name}")
        function.restype, function.argtypes = result, arguments
    return functions


class SharedMemory:
    """This rank's place in the memory. The object owns `file`, a descriptor of the memory, and closes it.

    Args:
        file: of `bytes_for(len(names))` bytes, which are zero before one rank has called `create`.
        rank: of this process among those of the host.
        names: how messages call each rank of the host.
    """

    def __init__(self, file: int, rank: int, names: list[str]) -> None:
        functions = library()
        assert functions is not None
        self._functions, self.file, self.rank, self.names = functions, file, rank, names
        self._all_reduce = functions.syncbn_shared_all_reduce
        self.memory = torch.frombuffer(mmap.mmap(file, bytes_for(len(names))), dtype=torch.uint8)
        self._address = ctypes.c_void_p(self.memory.data_ptr())  # converted once, not at each call
        # A lock on byte `rank` that belongs to this process. A lock by flock would belong to the open file, and live on in forked children,
        # such as a data loader's workers.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        self._turn = threading.Lock()
        weakref.finalize(self, os.close, file)

    def create(self, by_segments: bool | None = None) -> None:
        """Called by one rank, before any other maps the file."""
        ranks = len(self.names)
        self._functions.syncbn_shared_create(self._address, ranks, ranks > ALL_READ_ALL if by_segments is None else by_segments)

    def join(self, random: int) -> None:
        """Called by each rank. `random` (64 bits) is the value that the other ranks must find."""
        self._functions.syncbn_shared_join(self._address, self.rank, random)

    def randoms(self) -> list[int]:
        return [self._functions.syncbn_shared_random_of(self._address, rank) for rank in range(len(self.names))]

    def start(self) -> None:
        """Called by each rank, once all have joined."""
        self._functions.syncbn_shared_start(self._address, self.rank)

    def all_reduce_(self, values: Tensor, digest: int, timeout: float, channels: int = 0) -> Tensor:
        """The sum of `values`, contiguous float64, over the ranks of the host, in place, bitwise identical on all of them.

        With `channels` they are statistics [3 * channels + 4], each rank's about its own shift; see csrc/cpu/shared_memory.h.

        Raises:
            Mismatch: on every rank, if their digests or lengths differ. The next exchange may follow.
            SharedExchangeError: a rank is missing after `timeout` seconds, or its process has ended; or a rank, perhaps this one, has given
                up an exchange. No exchange can follow. Or another thread of this process has been exchanging for `timeout` seconds; then
                later exchanges can follow.
            Forked: `memory` belongs to the parent of this process.
        """
        if values.dtype is not torch.float64 or not values.is_contiguous() or not values.is_cpu:
            raise ValueError(f"values must be contiguous float64 on the CPU, got {values.dtype} with strides {values.stride()}")
        turn = self._turn
        if not (turn.acquire(False) or turn.acquire(True, min(timeout, threading.TIMEOUT_MAX))):
            raise SharedExchangeError(f"another thread of this process has been exchanging for {timeout:g} s")
        try:
            call = self._address, self.rank, values.data_ptr(), values.numel(), channels, digest
            status = self._all_reduce(*call)
            if status == _WAITING:
                status = self._wait(call, timeout)
            if status != _DONE:
                raise self._error(status)
        except Mismatch:
            raise
        except BaseException:  # Ctrl-C included: the others may have completed this exchange, and this rank has no result of it
            self.abandon()
            raise
        finally:
            turn.release()
        return values

    def abandon(self) -> None:
        """Makes all exchanges in this memory fail from now on, on this rank and on the others."""
        self._functions.syncbn_shared_abandon(self._address, self.rank)

    def _wait(self, call: tuple, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self._all_reduce(*call)) == _WAITING:
            presence = self._presence()
            if _GAVE_UP in presence.values():  # the missing rank may be another one, and come much later
                return _ABANDONED
            if _ENDED in presence.values():
                raise SharedExchangeError(self._missing(presence))
            if time.monotonic() > deadline:
                raise SharedExchangeError(f"{self._missing(presence)}, after {timeout:g} s")
        return status

    def _presence(self) -> dict[str, int]:
        """The state of each other rank, by name."""
        look = self._functions.syncbn_shared_presence
        return {name: look(self._address, self.rank, r, self.file) for r, name in enumerate(self.names) if r != self.rank}

    def _missing(self, presence: dict[str, int]) -> str:
        ended = [name for name, state in presence.items() if state == _ENDED]
        late = [name for name, state in presence.items() if state == _LATE]
        parts = [f"{', '.join(ended)}: the process has ended or has destroyed the group"] if ended else []
        return "; ".join(parts + ([f"{', '.join(late)}: not there yet, but alive"] if late else []))

    def _error(self, status: int) -> Exception:
        if status == _MISMATCH:
            return Mismatch()
        if status == _FORKED:
            return Forked(
                "this process was forked from one that already exchanges in shared memory:"
                " start processes by spawn or forkserver, or make a process group after the fork"
            )
        presence = self._presence()
        gave_up = [name for name, state in presence.items() if state == _GAVE_UP]
        ended = f"{self._missing(presence)}; " if _ENDED in presence.values() else ""
        who = f"{', '.join(gave_up)} gave up an exchange" if gave_up else "this rank gave up an earlier exchange"
        return SharedExchangeError(f"{ended}{who}, so this group can exchange no more: make it again, or start the job again")


def bytes_for(ranks: int) -> int:
    functions = library()
    assert functions is not None
    return functions.syncbn_shared_bytes(ranks)


def slots_offset(ranks: int) -> int:
    """Where the slots begin. Memory from here on is never read before it is written."""
    functions = library()
    assert functions is not None
    return functions.syncbn_shared_slots_offset(ranks)
