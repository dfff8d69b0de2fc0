"""The base of communicators whose backend can only add tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class SumsAboutZero:
    """Exchanges statistics as sums about 0: the shifts, which are all 0, are not sent, and the rest is added up."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def merges(self, device: torch.device) -> bool:
        return False

    def all_reduce_stats_(self, stats: Tensor, channels: int) -> Tensor:
        total = self.all_reduce_(stats[channels:])
        # An exchange in a graph is not in place.
        return torch.cat([stats[:channels], total]) if torch.compiler.is_compiling() else stats
