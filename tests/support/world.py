"""The ranks of this run: the single one of a plain `pytest`, or those of torchrun or mpirun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.environment import rank_info

HERE = rank_info()
UNDER_MPI = HERE.launcher not in (None, "torchrun")
TIMEOUT = int(os.environ.get("SYNCBN_TEST_TIMEOUT", 60))  # seconds: a rank that fails leaves the others waiting no longer than this


@dataclass(frozen=True)
class World:
    """The ranks of this run."""

    rank: int
    size: int
    group: Any  # what a layer gets as process_group

    def mine(self, whole: Tensor, counts: tuple[int, ...]) -> Tensor:
        """This rank's rows of the whole batch, as a tensor of its own."""
        return whole.split(counts)[self.rank].clone(memory_format=torch.preserve_format)

    def all_gather(self, t: Tensor) -> list[Tensor]:
        """`t` of every rank, for comparisons."""
        if self.size == 1:
            return [t]
        if UNDER_MPI:
            return [part.to(t.device) for part in self.group.allgather(t.detach().cpu())]
        tensors = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(tensors, t.detach().contiguous())
        return tensors
