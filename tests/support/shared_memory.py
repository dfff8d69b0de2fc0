"""Memory that the ranks of a test share."""

from __future__ import annotations

import torch

from syncbn import native
from syncbn.comm.meeting import meet
from syncbn.comm.shared_memory import SharedMemory

WHY_NOT = native.status()[0].reason  # why the CPU library was not loaded, or, if it lacks this exchange, which of its code runs
TIMEOUT = 60.0


def gather(world, row: bytes) -> list[bytes]:
    return [bytes(t.tolist()) for t in world.all_gather(torch.frombuffer(bytearray(row), dtype=torch.uint8))]


def set_up(world) -> SharedMemory:
    memory = meet(lambda row: gather(world, row), world.rank, world.size).memory
    assert memory is not None
    return memory
