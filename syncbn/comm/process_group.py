"""A torch.distributed process group: NCCL, gloo, or whatever else adds float64 tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor


class NotAMember(ValueError):
    """A process group that does not contain this rank."""


@dataclass(frozen=True)
class ProcessGroupCommunicator:
    group: dist.ProcessGroup
    compares = True

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def world_size(self) -> int:
        return self.group.size()

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return functional_collectives.all_reduce(tensor, "sum", self.group)  # the form that a graph can hold
        # Straight to the group: dist.all_reduce costs 2 µs more, at 106 collectives a step for ResNet-50.
        options = dist.AllreduceOptions()
        # reduceOp is SUM unless set
        options.asyncOp = False  # NCCL then runs on the current stream, with no event to wait for
        work = self.group.allreduce([tensor], options)
        if work is not None:
            work.wait()
        return tensor
