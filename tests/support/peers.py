"""peer_all_reduce of the emulation: its ranks are blocks of one grid, or processes whose shared memory stands for that of GPUs."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import environment
from syncbn.comm import exchange, peer_memory, peers
from syncbn.comm.peer_memory import MAX_PEERS, Peers

CAPACITY = 70  # values of an exchange between blocks
PATIENCE = 400  # rounds in which every thread polls
THREADS = 64  # of a block
CAPACITY_OF_PROCESSES = 256


class Exchanges(ctypes.Structure):
    """The struct of this name in tests/kernels/emulation/peers.cu."""

    _fields_ = [
        ("peers", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("ranks", "exchanges", "blocks", "threads")),
    ]


@dataclass
class Received:
    """What each rank received."""

    values: list[list[Tensor]]  # of each rank and exchange
    missing: list[int]
    numbers: list[list[int]]


class Ranks:
    """The ranks of a node as blocks of one grid."""

    def __init__(self, path: str | Path) -> None:
        self.library = peer_memory.declared(ctypes.CDLL(str(path)))
        assert self.library is not None, "csrc/cuda/peer_all_reduce.h and syncbn/comm/peer_memory.py differ"
        self.library.emulate_ranks.restype = ctypes.c_char_p

    def exchange(self, sent: list[list[Tensor]], seed: int, threads: int = THREADS, first_number: int = 0) -> Received:
        """`sent[rank][e]`; an empty one is an exchange that this rank leaves out. Memory starts as PeerMemory makes it."""
        ranks, exchanges = len(sent), len(sent[0])
        places = torch.zeros(ranks, 2 * ranks * CAPACITY * 4, dtype=torch.int32)
        numbers = torch.full((ranks, CAPACITY + 1), first_number, dtype=torch.int64).to(torch.uint32)
        numbers.view(torch.int32)[:, CAPACITY] = 0
        missing = torch.zeros(ranks, dtype=torch.int64)
        values = torch.full((ranks, exchanges, CAPACITY), -1.0, dtype=torch.float64)
        lengths = torch.tensor([[part.numel() for part in row] for row in sent])
        for rank, row in enumerate(sent):
            for e, part in enumerate(row):
                values[rank, e, : part.numel()] = part
        addresses = (ctypes.c_void_p * MAX_PEERS)(*(row.data_ptr() for row in places))
        peers = (Peers * ranks)(
            *(
                Peers(addresses, numbers[rank].data_ptr(), missing[rank:].data_ptr(), CAPACITY, PATIENCE, rank, ranks)
                for rank in range(ranks)
            )
        )
        blocks = -(-CAPACITY // threads)
        all_of_them = Exchanges(ctypes.addressof(peers), values.data_ptr(), lengths.data_ptr(), ranks, exchanges, blocks, threads)
        error = self.library.emulate_ranks(ctypes.byref(all_of_them), ctypes.c_uint64(seed))
        assert error is None, error.decode()
        for rank, row in enumerate(sent):
            for e, part in enumerate(row):
                assert (values[rank, e, part.numel() :] == -1).all(), "written out of bounds"
        received = [[values[rank, e, : sent[rank][e].numel()].clone() for e in range(exchanges)] for rank in range(ranks)]
        return Received(received, missing.tolist(), numbers.view(torch.int32).tolist())

    def refused(self, numel: int) -> bool:
        """Whether the launcher refuses an exchange of this many values."""
        peers = Peers((ctypes.c_void_p * MAX_PEERS)(), None, None, CAPACITY, PATIENCE, 0, 2)
        return self.library.syncbn_peer_all_reduce(ctypes.byref(peers), None, numel, 0, 0, None) is not None


# ---- Processes ----------------------------------------------------------------------------------------------------------------


class SharedFiles(NamedTuple):
    """syncbn._torch_private.SymmetricMemory, on the CPU."""

    own: Tensor
    addresses: list[int]
    handle: Any

    @classmethod
    def map(cls, size: int, group: dist.ProcessGroup, device: torch.device) -> SharedFiles:
        """A file of each rank, which all of them map."""
        token = torch.randint(2**62, (1,)) if group.rank() == 0 else torch.zeros(1, dtype=torch.int64)
        dist.broadcast(token, group=group, group_src=0)
        paths = [Path(f"/dev/shm/syncbn-test-{token.item():x}-{rank}") for rank in range(group.size())]
        paths[group.rank()].write_bytes(bytes(size))
        dist.barrier(group)
        files = [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]
        dist.barrier(group)
        paths[group.rank()].unlink()
        return cls(files[group.rank()], [file.data_ptr() for file in files], files)


class Stream:
    """A stand-in for torch.cuda.Stream that notes what it waits for."""

    def __init__(self, name: str = "default", captures: bool = False) -> None:
        self.name, self.captures, self.cuda_stream = name, captures, None
        self.waits: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other.name)


def stand_in(patch: pytest.MonkeyPatch, path: Path, seed: int = 0) -> None:
    """From now on CPU tensors are exchanged as those on GPUs: by the emulated kernel, in memory that the processes share."""
    functions = peer_memory.declared(ctypes.CDLL(str(path)))
    functions.emulate_process(ctypes.c_uint64(seed))
    stream = Stream()
    patch.setattr(environment, "settings", environment.settings._replace(peer=True))
    patch.setattr(exchange, "way_of", lambda state, tensor: state.way(peers.PeerExchange))
    patch.setattr(peers, "CAPACITY", CAPACITY_OF_PROCESSES)
    patch.setattr(peers, "gpu_digest", lambda device: f"rank {seed}".encode())
    patch.setattr(peers, "why_no_access", lambda device, gpus: "")
    patch.setattr(peer_memory, "library", lambda: functions)
    patch.setattr(peer_memory, "symmetric_memory", SharedFiles.map)
    patch.setattr(peer_memory, "current_stream", lambda device: stream)
    patch.setattr(peer_memory, "is_capturing", lambda stream: stream.captures)
    patch.setattr(peer_memory, "on_device", lambda device: nullcontext())
