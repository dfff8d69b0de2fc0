"""A torch.distributed process group: NCCL, gloo, or any other backend that adds tensors of float64, int64 and uint8."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_private import all_reduce_in_graph, constant_in_graphs, default_store
from .duplicates import duplicate_of_default, timeout_of
from .failures import Incomplete
from .sums import SumsAboutZero


class NotAMember(ValueError):
    """A process group that does not contain this rank."""


class TorchCommunicator(SumsAboutZero):
    """The common part of the communicators over a process group."""

    if TYPE_CHECKING:  # at run time a dataclass would use the property as the default of its field

        @property
        def group(self) -> dist.ProcessGroup: ...

    @property
    def timeout(self) -> float:
        """Seconds."""
        return (timeout_of(self.group) or dist.default_pg_timeout).total_seconds()

    def among(self, ranks: list[int]) -> ProcessGroupCommunicator | None:
        """`Communicator.among`, over gloo."""
        rank = self.group.rank()
        number = torch.tensor(secrets.randbits(62) if rank == ranks[0] else 0, device="cpu")
        all_reduce_(number, self.group)
        if rank not in ranks:
            return None
        # Not dist.new_group: it names a group by the number of groups that this rank belongs to, which may differ by rank, and a group that
        # is made again would read the addresses of the destroyed one.
        store = dist.PrefixStore(f"syncbn {number.item()}", default_store())
        timeout = timeout_of(self.group) or dist.default_pg_timeout
        group: Any = dist.ProcessGroupGloo(store, ranks.index(rank), len(ranks), timeout)  # a backend, which adds as a group does
        return ProcessGroupCommunicator(group)


@dataclass(frozen=True)
class ProcessGroupCommunicator(TorchCommunicator):
    """Exchanges in `group` itself."""

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
            return all_reduce_in_graph(tensor, self.group)
        return all_reduce_(tensor, self.group)


@dataclass(frozen=True)
class DefaultGroupCommunicator(TorchCommunicator):
    """Exchanges in a duplicate of the default group, which the first exchange makes: see duplicates.py."""

    default: dist.ProcessGroup
    compares = True

    @property
    def group(self) -> dist.ProcessGroup:
        """The duplicate. The first call is collective."""
        return duplicate_of_default(self.default)

    @property
    def rank(self) -> int:
        return self.default.rank()

    @property
    def world_size(self) -> int:
        return self.default.size()

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return all_reduce_in_graph(tensor, _name_of_duplicate())
        return all_reduce_(tensor, duplicate_of_default(self.default))


@constant_in_graphs
def _name_of_duplicate() -> str:
    """Runs while torch traces. If it makes the duplicate, every rank takes part, because every rank traces its first exchange or runs it.
    The layer reads the default group's rank and size, so torch guards on that group, and traces again after another has replaced it."""
    default = dist.group.WORLD
    assert default is not None
    return duplicate_of_default(default).group_name


def all_reduce_(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Bypasses dist.all_reduce, which adds 2 µs a call; ResNet-50 makes 106 calls a step.
    options = dist.AllreduceOptions()
    # reduceOp is SUM unless set
    options.asyncOp = False  # NCCL then runs on the current stream, with no event to wait for
    try:
        work = group.allreduce([tensor], options)
    except RuntimeError as error:
        if dist.get_debug_level() == dist.DebugLevel.DETAIL:  # the call has waited for the other ranks, and compared them
            raise Incomplete(error) from error
        raise
    if work is not None:
        try:
            work.wait()
        except Exception as error:
            raise Incomplete(error) from error
    return tensor
