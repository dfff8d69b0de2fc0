"""An mpi4py communicator, without torch.distributed.

CUDA tensors go through pinned host memory, or straight to MPI with SYNCBN_MPI_CUDA_AWARE=1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor


@dataclass(frozen=True)
class MPICommunicator:
    """Works on a clone of `comm`, so that its messages cannot meet the caller's. The first exchange makes the clone."""

    comm: MPI.Comm

    def __post_init__(self) -> None:
        if self.comm.Is_inter():
            raise ValueError("process_group must be an intra-communicator, got an inter-communicator")

    @property
    def rank(self) -> int:
        return self.comm.Get_rank()

    @property
    def world_size(self) -> int:
        return self.comm.Get_size()

    @torch.compiler.disable
    def all_reduce_(self, tensor: Tensor) -> Tensor:
        clone = self._clone()
        if tensor.device.type == "cpu":
            clone.Allreduce(MPI.IN_PLACE, tensor.numpy())
        elif os.environ.get("SYNCBN_MPI_CUDA_AWARE") == "1":
            torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows no stream: the buffer must be written by now
            clone.Allreduce(MPI.IN_PLACE, tensor)
        else:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor)
            clone.Allreduce(MPI.IN_PLACE, host.numpy())
            tensor.copy_(host, non_blocking=True)
        return tensor

    def _clone(self) -> MPI.Comm:
        """One clone for each communicator, kept as its attribute, and freed with it."""
        clone: Any = self.comm.Get_attr(_CLONE)
        if clone is None:
            clone = self.comm.Dup()
            self.comm.Set_attr(_CLONE, clone)
        return clone


_CLONE = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, clone: clone.Free(), nopython=False)
