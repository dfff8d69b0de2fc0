"""A communicator whose exchanges are recorded, so that a rank without data can answer them; see `syncbn.join`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .process_group import ProcessGroupCommunicator


class Note(NamedTuple):
    """One all-reduce: what a rank needs to take part in it with zeros."""

    group: dist.ProcessGroup
    length: int
    dtype: torch.dtype
    device: torch.device

    def answer(self) -> dist.Work:
        """Takes part with zeros. Returns at once, because the others may be much later."""
        zeros = torch.zeros(self.length, dtype=self.dtype, device=self.device)
        work = dist.all_reduce(zeros, group=self.group, async_op=True)
        assert work is not None
        return work


@dataclass(frozen=True)
class RecordedCommunicator(ProcessGroupCommunicator):
    exchanges: list[Note]
    outside: Any  # the layer's process_group outside of join, which a copy of the layer gets
    compares = False  # a finished rank answers with zeros, and with the exchanges of its last call, so it cannot take part in a comparison

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the layer's process_group outside of join."""
        return (type(None), ()) if self.outside is None else self.outside.__reduce_ex__(protocol)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("syncbn.join cannot see the exchanges of a compiled model: use it with the model that is not compiled")
        self.exchanges.append(Note(self.group, tensor.numel(), tensor.dtype, tensor.device))
        return super().all_reduce_(tensor)
