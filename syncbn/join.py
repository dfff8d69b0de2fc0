"""Uneven numbers of batches: a rank that runs out of data keeps answering the other ranks' exchanges with zeros.

    active rank     notifies ──► forward exchanges ──► backward exchanges                         (each time the model is called)
    finished rank   is notified ──► answers the exchanges that its last call had, with zeros ──► the other joinables' hooks

Zeros represent a rank without samples, which every formula already handles. The exchanges use process groups that no other code uses:
DDP's collectives, which a finished rank joins at the same time, can neither block them nor be confused with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from ._torch_private import join_configs_restored
from .comm import LOCAL, resolve
from .comm.duplicates import duplicate_of
from .comm.process_group import DefaultGroupCommunicator, ProcessGroupCommunicator
from .comm.recorded import Note, RecordedCommunicator
from .modules import SyncBatchNorm

_NO_BATCH = (
    "rank {} has no batch at all inside syncbn.join, so it cannot know which exchanges to answer:"
    " give every rank at least one batch, which may be empty ([0, C, *])"
)


@contextmanager
def join(
    model: nn.Module, *joinables: Joinable, enable: bool = True, throw_on_early_termination: bool = False, **kwargs: Any
) -> Iterator[None]:
    """Wraps a training loop whose ranks have different numbers of batches: ranks that finish early keep answering the others.

    Every rank enters and leaves it. With a DistributedDataParallel model it replaces `model.join()`. A finished rank counts as a rank
    without samples; finally every rank receives the moving statistics of its group's last active rank.

    Args:
        model: a model with synchronized layers, wrapped in DistributedDataParallel or not. The loop calls it once for each backward
            pass, always in the same way. In eval mode inside the loop call the unwrapped model.
        joinables: other joinables, such as a ZeroRedundancyOptimizer, or a second model in DistributedDataParallel, which each step
            calls after `model`. A DistributedDataParallel `model` joins without being listed.
        enable, throw_on_early_termination, kwargs: as in `torch.distributed.algorithms.Join`.

    Raises:
        ValueError: a layer's process group does not belong to torch.distributed.
        RuntimeError: a rank has no batch at all (raised on every rank); join is already active for the model; or another rank does not
            answer within the group's timeout.

    >>> device = syncbn.init_process_group()
    >>> model = nn.Sequential(nn.Linear(4, 3), syncbn.SyncBatchNorm(3))
    >>> with syncbn.join(model):
    ...     for x in torch.randn(2, 8, 4):
    ...         model(x).square().sum().backward()
    >>> torch.distributed.destroy_process_group()
    """
    models = [model, *(other for other in joinables if isinstance(other, nn.Module))]
    batch_norms = dict.fromkeys(m for each in models for m in each.modules() if isinstance(m, SyncBatchNorm))
    layers = [m for m in batch_norms if _communicator(m.process_group) is not LOCAL]
    if any(isinstance(layer.process_group, RecordedCommunicator) for layer in layers):
        raise RuntimeError("syncbn.join is active for this model: it cannot be entered a second time before it has been left")
    inside: AbstractContextManager[None] = nullcontext()
    joined = [model, *joinables] if isinstance(model, Joinable) else [*joinables]  # a DistributedDataParallel is one
    if layers and enable:
        joinable = _SyncBatchNorms(model, layers)
        inside = joinable.recorded()
        joined.insert(0, joinable)  # first, so that its notification precedes every collective of the model or the other joinables
    with inside, join_configs_restored(joined), Join(joined, enable, throw_on_early_termination, **kwargs) if joined else nullcontext():
        yield


class _SyncBatchNorms(Joinable):
    """The synchronized layers of a model and of the models listed after it. `calls` counts the first one's training calls on this rank."""

    def __init__(self, model: nn.Module, layers: list[SyncBatchNorm]) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.calls = 0
        self.exchanges: list[Note] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, the layers exchange in duplicated groups, and `exchanges` lists the exchanges of the model's last call."""
        before = [layer.process_group for layer in self.layers]
        groups = [_group_inside(_communicator(group)) for group in before]  # first, so that an error leaves the model unchanged
        handle = self.model.register_forward_pre_hook(_CallHook(self), prepend=True)
        for layer, inside, outside in zip(self.layers, groups, before, strict=True):
            layer.process_group = RecordedCommunicator(inside, self.exchanges, outside)
        try:
            yield
        finally:
            handle.remove()
            for layer, group in zip(self.layers, before, strict=True):
                layer.process_group = group

    def call(self) -> None:
        """Runs before each call of the model: notifies the finished ranks and starts a new list of exchanges."""
        if not any(m.training for m in self.model.modules() if m is self.model or isinstance(m, SyncBatchNorm)):
            return
        with self.waiting(f"before call {self.calls + 1} of the model"):
            work = Join.notify_join_context(self)
            if work is not None:
                work.wait()
        self.calls += 1
        self.exchanges.clear()
        if self.calls == 1:
            self.check_all_have_a_batch()

    @contextmanager
    def waiting(self, when: str) -> Iterator[None]:
        """Adds to a backend's error which rank waited, and for what."""
        try:
            yield
        except RuntimeError as error:
            rank, size = dist.get_rank(self.join_process_group), dist.get_world_size(self.join_process_group)
            raise RuntimeError(
                f"syncbn.join: {error}\nrank {rank} of {size} could not reach the other ranks {when}."
                " Another rank has failed inside syncbn.join, or has left it too early"
            ) from error

    def check_all_have_a_batch(self) -> None:
        """Runs in each rank's first round, active or finished. Raises on every rank if one has finished without calling the model."""
        missing = torch.zeros(dist.get_world_size(self.join_process_group), device=self.join_device)
        if not self.calls:
            missing[dist.get_rank(self.join_process_group)] = 1
        with self.waiting("in the first round"):
            dist.all_reduce(missing, group=self.join_process_group)
        for rank in missing.nonzero().flatten().tolist():
            raise RuntimeError(_NO_BATCH.format(rank))

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _FinishedRank(self)

    @property
    def join_device(self) -> torch.device:
        if isinstance(self.model, Joinable):
            return self.model.join_device
        return next((t.device for layer in self.layers for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        if isinstance(self.model, Joinable):
            return self.model.join_process_group
        group = dist.group.WORLD
        assert group is not None
        return group


class _FinishedRank(JoinHook):
    """What a rank without further batches does for the layers of the active ranks."""

    def __init__(self, joinable: _SyncBatchNorms) -> None:
        self.joinable = joinable
        self.pending: list[dist.Work] = []

    def main_hook(self) -> None:
        """Starts a round of zeros, and waits only for the round before, because DDP's hooks must run concurrently."""
        if not self.joinable.calls:
            self.joinable.check_all_have_a_batch()
        self._wait()
        self.pending = [exchange.answer() for exchange in self.joinable.exchanges]

    def post_hook(self, is_last_joiner: bool) -> None:
        """Gives every rank of a group the moving statistics of the group's rank with the most calls."""
        self._wait()
        with self.joinable.waiting("at the end, to share the moving statistics"):
            for group in dict.fromkeys(layer.process_group.group for layer in self.joinable.layers):
                source = self._rank_with_most_calls(group)
                for layer in self.joinable.layers:
                    if layer.process_group.group is group:
                        for buffer in layer.buffers():
                            dist.broadcast(buffer, group=group, group_src=source)

    def _rank_with_most_calls(self, group: dist.ProcessGroup) -> int:
        """One all-reduce finds it: the greatest of calls * size + rank has the most calls, and its remainder by size is the rank."""
        size = group.size()
        greatest = torch.tensor(self.joinable.calls * size + group.rank(), device=self.joinable.join_device)
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group)
        return int(greatest) % size

    def _wait(self) -> None:
        with self.joinable.waiting("after its last batch, to answer their exchanges"):
            for work in self.pending:
                work.wait()
        self.pending = []


class _CallHook:
    """The model's forward pre-hook. In a copy of the model it does nothing, because a copy does not take part in join."""

    def __init__(self, layers: _SyncBatchNorms | None) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if self.layers is not None:
            self.layers.call()

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallHook:
        return _CallHook(None)

    def __reduce__(self) -> Any:
        return _CallHook, (None,)


def _communicator(process_group: Any) -> Any:
    """As `resolve`, but a group of one rank is not LOCAL: other ranks' groups may be larger, and their `join` needs every rank."""
    comm = resolve(process_group)
    if comm is LOCAL and process_group is not None:
        group = process_group.get_group() if hasattr(process_group, "get_group") else process_group  # a DeviceMesh has one
        if isinstance(group, dist.ProcessGroup):
            return ProcessGroupCommunicator(group)
    return comm


def _group_inside(comm: Any) -> dist.ProcessGroup:
    """The group in which a layer exchanges inside join: one that no other code uses."""
    if isinstance(comm, DefaultGroupCommunicator):
        return comm.group
    if not isinstance(comm, ProcessGroupCommunicator):
        raise ValueError("syncbn.join needs layers whose process_group belongs to torch.distributed")
    return duplicate_of(comm.group)
