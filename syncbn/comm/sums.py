"""For communicators that can add tensors, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


class SumsAboutZero:
    """The group's statistics as sums about 0: their shifts are all 0 and stay here, the rest is added up."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def merges(self, device: torch.device) -> bool:
        return False

    def all_reduce_stats_(self, stats: Tensor, channels: int) -> Tensor:
        total = self.all_reduce_(stats[channels:])
        # A graph holds no exchange in place.
        return torch.cat([stats[:channels], total]) if torch.compiler.is_compiling() else stats
