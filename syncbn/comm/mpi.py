"""An mpi4py communicator, without torch.distributed.

CUDA tensors go through pinned host memory, or straight to MPI with SYNCBN_MPI_CUDA_AWARE=1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from .. import environment
from .failures import Incomplete
from .process_group import NotAMember
from .sums import SumsAboutZero


class Duplicate:
    """A duplicate of a communicator, whose messages cannot be confused with those of the original."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self.parts: list[MPI.Comm] = []  # communicators of some of its ranks

    def free(self) -> None:
        for comm in (*self.parts, self.comm):
            comm.Free()


@dataclass(frozen=True)
class MPICommunicator(SumsAboutZero):
    """Works on a duplicate of `comm`, which the first exchange makes."""

    comm: MPI.Comm
    compares = True

    def __post_init__(self) -> None:
        self._check()
        if self.comm.Is_inter():
            raise ValueError("process_group must be an intra-communicator, got an inter-communicator")

    @property
    def group(self) -> Duplicate:
        """The duplicate of `comm`, kept as its attribute and freed with it. The first call is collective."""
        self._check()  # the communicator may have been freed since the forward pass
        duplicate: Any = self.comm.Get_attr(_DUPLICATE)
        if duplicate is None:
            comms = []

            def start() -> MPI.Request:
                comm, request = self.comm.Idup()
                comms.append(comm)
                return request

            InFlight(comms).run(start)
            duplicate = Duplicate(comms[0])
            self.comm.Set_attr(_DUPLICATE, duplicate)
        return duplicate

    @property
    def timeout(self) -> float:
        """Seconds."""
        return environment.settings.mpi_timeout

    def among(self, ranks: list[int]) -> MPICommunicator | None:
        """`Communicator.among`."""
        members = self.group.comm.Split(0 if self.rank in ranks else MPI.UNDEFINED, self.rank)
        if members == MPI.COMM_NULL:
            return None
        self.group.parts.append(members)
        return MPICommunicator(members)

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
        comm = self.group.comm
        if tensor.device.type == "cpu":
            _all_reduce(comm, tensor.numpy())
        elif environment.settings.mpi_cuda_aware:
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows no stream: the buffer must be written by now
            _all_reduce(comm, tensor)
        else:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor)
            _all_reduce(comm, host.numpy())
            tensor.copy_(host, non_blocking=True)
        return tensor


class InFlight:
    """A request, and the memory into which MPI writes until the request has completed.

    After a wait that was cut short (by Ctrl-C, a signal handler's exception, or the timeout) MPI continues to write, because late ranks
    complete the request. So `_in_flight` holds both from before the request is made until the wait sees it completed.
    """

    def __init__(self, buffer: Any = None) -> None:
        self.buffer = buffer
        self.request: MPI.Request | None = None

    def run(self, start: Callable[[], MPI.Request]) -> None:
        """Starts the request and waits for it. Raises Incomplete if MPI reports an error, and after SYNCBN_MPI_TIMEOUT seconds; MPI
        itself has no timeout."""
        _in_flight.add(self)
        try:
            self.request = start()
        except MPI.Exception:
            _in_flight.discard(self)  # nothing has started
            raise
        deadline = time.monotonic() + environment.settings.mpi_timeout
        while not self._completed():
            if time.monotonic() > deadline:
                seconds = environment.settings.mpi_timeout
                raise Incomplete(f"another rank did not arrive within SYNCBN_MPI_TIMEOUT={seconds:g} seconds")
            time.sleep(0)  # yield to other ranks that share this core
        _in_flight.discard(self)

    def _completed(self) -> bool:
        assert self.request is not None
        try:
            return self.request.Test()
        except MPI.Exception as error:
            raise Incomplete(error) from error


_in_flight: set[InFlight] = set()


def _all_reduce(comm: MPI.Comm, buffer: Any) -> None:
    """Sums `buffer` in place."""
    InFlight(buffer).run(lambda: comm.Iallreduce(MPI.IN_PLACE, buffer))


_DUPLICATE = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, duplicate: duplicate.free(), nopython=False)
