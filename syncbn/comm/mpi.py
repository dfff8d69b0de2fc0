"""An mpi4py communicator, without torch.distributed.

CUDA tensors go through pinned host memory, or straight to MPI with SYNCBN_MPI_CUDA_AWARE=1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from .. import environment
from .process_group import NotAMember
from .sums import SumsAboutZero


class Clone:
    """A communicator's twin, whose messages cannot meet those of the first."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm


@dataclass(frozen=True)
class MPICommunicator(SumsAboutZero):
    """Works on a clone of `comm`, which the first exchange makes."""

    comm: MPI.Comm
    compares = True

    def __post_init__(self) -> None:
        self._check()
        if self.comm.Is_inter():
            raise ValueError("process_group must be an intra-communicator, got an inter-communicator")

    @property
    def group(self) -> Clone:
        """One for each communicator, kept as its attribute and freed with it. The first call is collective."""
        self._check()  # it may have been freed since the forward pass
        clone: Any = self.comm.Get_attr(_CLONE)
        if clone is None:
            twin, request = self.comm.Idup()
            _wait(request)
            clone = Clone(twin)
            self.comm.Set_attr(_CLONE, clone)
        return clone

    @property
    def rank(self) -> int:
        return self.comm.Get_rank()

    @property
    def world_size(self) -> int:
        return self.comm.Get_size()

    def _check(self) -> None:
        if self.comm == MPI.COMM_NULL:
            raise NotAMember("process_group is MPI.COMM_NULL: it does not contain this rank, or it has been freed")

    @torch.compiler.disable
    def all_reduce_(self, tensor: Tensor) -> Tensor:
        clone = self.group.comm
        if tensor.device.type == "cpu":
            _all_reduce(clone, tensor.numpy())
        elif environment.settings.mpi_cuda_aware:
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows no stream: the buffer must be written by now
            _all_reduce(clone, tensor)
        else:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor)
            _all_reduce(clone, host.numpy())
            tensor.copy_(host, non_blocking=True)
        return tensor


def _all_reduce(comm: MPI.Comm, buffer: Any) -> None:
    """Sums `buffer` in place."""
    _wait(comm.Iallreduce(MPI.IN_PLACE, buffer), buffer)


def _wait(request: MPI.Request, buffer: Any = None) -> None:
    """Raises TimeoutError after SYNCBN_MPI_TIMEOUT seconds (default 1800); MPI itself never does."""
    timeout = environment.settings.mpi_timeout
    deadline = time.monotonic() + timeout
    while not request.Test():
        if time.monotonic() > deadline:
            _abandoned.append((request, buffer))
            raise TimeoutError(f"some rank did not come within SYNCBN_MPI_TIMEOUT={timeout:g} seconds")
        time.sleep(0)  # to the other ranks of this core, if there are any


_abandoned: list[tuple[MPI.Request, Any]] = []  # a rank that comes late still writes into these buffers
_CLONE = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, clone: clone.comm.Free(), nopython=False)
