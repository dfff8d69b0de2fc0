"""Memory of a node's GPUs in which the ranks add a few thousand values: one launch on each, of 3 to 5 µs by prediction, instead of NCCL's
15 to 20 µs. It has not run on two GPUs yet.

The protocol is in csrc/cuda/peer_all_reduce.cuh: every rank writes its values into the memory of all others, waits for theirs, and adds
in the order of ranks. A rank that does not come is noticed by the kernel, after the group's timeout; the next exchange raises the error.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import native
from .._torch_private import symmetric_memory
from .failures import Incomplete

MAX_PEERS = 16
MOST_SECONDS = 1e9  # that a rank waits; in nanoseconds they fit in 64 bits


class Peers(ctypes.Structure):
    """csrc/cuda/peer_all_reduce.h"""

    _fields_ = [
        ("places", ctypes.c_void_p * MAX_PEERS),
        ("numbers", ctypes.c_void_p),
        ("missing", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("patience", ctypes.c_uint64),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
    ]


class Missing(Incomplete):
    """A rank did not send its values to an exchange; no other exchange can follow in the group."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled side; None if it was not built or not loaded, or is of another version."""
    cuda = native.status()[1]
    return declared(ctypes.CDLL(str(cuda.path))) if cuda.loaded else None


def declared(functions: ctypes.CDLL) -> ctypes.CDLL | None:
    """`functions` with their types; None if the library lacks them, or has those of another version."""
    if not hasattr(functions, "syncbn_peer_all_reduce") or functions.syncbn_peers_bytes() != ctypes.sizeof(Peers):
        return None
    address = ctypes.c_void_p
    functions.syncbn_peers_prepare.restype = functions.syncbn_peer_all_reduce.restype = ctypes.c_char_p
    functions.syncbn_peers_prepare.argtypes = [address, ctypes.c_int]
    functions.syncbn_peer_all_reduce.argtypes = [address, address, ctypes.c_int64, ctypes.c_uint, ctypes.c_int, address]
    return functions


class PeerMemory:
    """This rank's part of the memory of a group. All ranks make theirs together.

    Args:
        signature: gives the signature of an exchange's key, for errors.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: float,
        signature: Callable[..., str],
        capacity: int,
    ) -> None:
        functions = library()
        assert functions is not None
        self.device, self._signature = device, signature
        self._index = device.index or 0
        rank, ranks = group.rank(), group.size()
        self._memory = symmetric_memory(2 * ranks * capacity * 16, group, device)
        if self._memory.addresses[rank] != self._memory.own.data_ptr():
            raise RuntimeError("torch's symmetric memory has another address than its tensor")
        self._numbers = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        self._missing = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._word = ctypes.c_uint64.from_address(self._missing.data_ptr())
        self._peers = Peers(
            (ctypes.c_void_p * MAX_PEERS)(*self._memory.addresses),
            self._numbers.data_ptr(), self._missing.data_ptr(), capacity, int(min(timeout, MOST_SECONDS) * 1e9), rank, ranks,
        )  # fmt: skip
        _check(functions.syncbn_peers_prepare(ctypes.byref(self._peers), self._index))
        self._all_reduce, self._address = functions.syncbn_peer_all_reduce, ctypes.addressof(self._peers)
        self._keys: dict[tuple[Any, ...], int] = {}  # of exchanges, with the numbers by which the kernel names them
        self._last: Any = None  # the stream of the last exchange
        self._turn = threading.Lock()
        synchronize(device)  # the zeros must be written before another stream uses them
        weakref.finalize(self, synchronize, device).atexit = False  # waits for kernels that still use the memory; not at exit

    @property
    def capacity(self) -> int:
        """The most values that an exchange can have."""
        return self._peers.capacity

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Inside, an exchange waits no longer than this for the other ranks."""
        patience = self._peers.patience
        self._peers.patience = min(patience, int(seconds * 1e9))
        try:
            yield
        finally:
            self._peers.patience = patience

    def takes(self, values: Tensor) -> bool:
        """Whether the memory can add these values; the same on every rank, if all are about to exchange the same."""
        return values.dtype is torch.float64 and 0 < values.numel() <= self._peers.capacity and values.is_contiguous()

    def all_reduce_(self, values: Tensor, key: tuple[Any, ...]) -> Tensor:
        """The sums of `values` over the ranks, in place, bitwise identical on all of them. Waits for no kernel, and can be captured.

        Raises:
            Missing: a rank did not come to an earlier exchange. The sums of that one, and of all after it, are NaN.
            ValueError: `values` are on another device than those of the group's first exchange.
        """
        if values.device != self.device:
            raise ValueError(f"a group exchanges in the memory of one GPU of each rank: here {self.device}, got values on {values.device}")
        with self._turn:
            self.check()
            number = self._keys.setdefault(key, len(self._keys))
            with on_device(self.device):
                stream = self._stream()
                _check(self._all_reduce(self._address, values.data_ptr(), values.numel(), number, self._index, stream.cuda_stream))
        return values

    def check(self) -> None:
        """Raises Missing if a kernel has reported a rank that did not come to its exchange. Does not wait for the device."""
        word = self._word.value
        if word:
            what, seconds = self._signature(*list(self._keys)[word >> 32]), self._peers.patience / 1e9
            raise Missing(
                f"rank {(word & 0xFFFFFFFF) - 1} sent nothing for {seconds:g} s to the {what}; its sums are NaN, and no exchange can follow"
                " it in this group"
            )

    def _stream(self) -> Any:
        """The current stream. It waits for the last exchange if that is on another stream, because the kernels must follow each other."""
        stream, last = current_stream(self.device), self._last
        # A capture cannot wait for work outside it, nor the reverse: the caller who replays the graph has to order the two.
        if last is not None and last != stream and is_capturing(last) == is_capturing(stream):
            stream.wait_stream(last)
        self._last = stream
        return stream


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(f"peer_all_reduce could not be launched: {error.decode()}")


# ---- What torch.cuda does, in one place, because the tests run all this without a GPU ------------------------------------------------


def current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device)


def is_capturing(stream: Any) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device) -> Any:
    return torch.cuda.device(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        with suppress(RuntimeError):  # a kernel's fatal error, which torch has reported
            torch.cuda.synchronize(device)
