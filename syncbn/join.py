"""Uneven numbers of batches: a rank that has run out of data goes on answering the others' exchanges with nothing.

    active rank     notifies ──► forward exchanges ──► backward exchanges                       (each time the model is called)
    rank that left  hears it ──► enqueues as many exchanges of zeros, as its own last call had ──► the other joinables' hooks

Zeros are a rank without samples, for which every formula holds. The exchanges have process groups of their own: those of DDP,
which a rank that has left answers at the same time, cannot wait for them, or be taken for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from .comm import resolve
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
    """Around a training loop whose ranks have different numbers of batches: those that finish first answer the others.

    Every rank enters and leaves it. With a DistributedDataParallel model it takes the place of `model.join()`. A rank that has
    left counts as one without samples; in the end all have the moving statistics of the rank that was last.

    Args:
        model: with synchronized layers, DistributedDataParallel or not; called once for each backward pass, always in the same
            way. For eval mode inside, call `model.module`.
        joinables: others, such as a ZeroRedundancyOptimizer. DistributedDataParallel is one by itself.
        enable, throw_on_early_termination, kwargs: of `torch.distributed.algorithms.Join`.

    Raises:
        ValueError: a layer's process group is not one of torch.distributed.
        RuntimeError: on every rank, if some rank has no batch at all, or if join is active for the model; if another rank does not
            answer within the group's timeout.

    >>> device = syncbn.init_process_group()
    >>> model = nn.Sequential(nn.Linear(4, 3), syncbn.SyncBatchNorm(3))
    >>> with syncbn.join(model):
    ...     for x in torch.randn(2, 8, 4):
    ...         model(x).square().sum().backward()
    >>> torch.distributed.destroy_process_group()
    """
    layers = [m for m in model.modules() if isinstance(m, SyncBatchNorm) and resolve(m.process_group).world_size > 1]
    if any(isinstance(layer.process_group, RecordedCommunicator) for layer in layers):
        raise RuntimeError("syncbn.join is active for this model: it cannot be entered a second time before it has been left")
    others = [*_own(model), *joinables]
    if not layers or not enable:
        with Join(others, enable, throw_on_early_termination, **kwargs) if others else nullcontext():
            yield
        return
    mine = _SyncBatchNorms(model, layers)
    # First in the list, so that it is this one that notifies: before anything that the model or the other joinables exchange.
    with mine.recorded(), Join([mine, *others], enable, throw_on_early_termination, **kwargs):
        yield


class _SyncBatchNorms(Joinable):
    """The synchronized layers of a model. `calls` counts the model's training calls on this rank."""

    def __init__(self, model: nn.Module, layers: list[SyncBatchNorm]) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.calls = 0
        self.exchanges: list[Note] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The layers exchange in groups of their own, and what they exchange is noted."""
        before = [layer.process_group for layer in self.layers]
        handle = self.model.register_forward_pre_hook(_CallHook(self), prepend=True)
        for layer in self.layers:
            group = _group_inside(resolve(layer.process_group))
            layer.process_group = RecordedCommunicator(group, self.exchanges, layer.process_group)
        try:
            yield
        finally:
            handle.remove()
            for layer, group in zip(self.layers, before, strict=True):
                layer.process_group = group

    def call(self) -> None:
        """Before each call of the model."""
        if not any(layer.training for layer in self.layers):
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
        """Names this rank, and what it waited for, in an error of the backend."""
        try:
            yield
        except RuntimeError as error:
            rank, size = dist.get_rank(self.join_process_group), dist.get_world_size(self.join_process_group)
            raise RuntimeError(
                f"syncbn.join: {error}\nrank {rank} of {size} could not reach the other ranks {when}."
                " Another rank has failed inside syncbn.join, or has left it before its time"
            ) from error

    def check_all_have_a_batch(self) -> None:
        """In each rank's first round, active or not: raises on all if one has left without having called the model."""
        missing = torch.zeros(dist.get_world_size(self.join_process_group), device=self.join_device)
        if not self.calls:
            missing[dist.get_rank(self.join_process_group)] = 1
        with self.waiting("in the first round"):
            dist.all_reduce(missing, group=self.join_process_group)
        for rank in missing.nonzero().flatten().tolist():
            raise RuntimeError(_NO_BATCH.format(rank))

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Answer(self)

    @property
    def join_device(self) -> torch.device:
        own = _own(self.model)
        if own:
            return own[0].join_device
        return next((t.device for layer in self.layers for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        own = _own(self.model)
        group = own[0].join_process_group if own else dist.group.WORLD
        assert group is not None
        return group


class _Answer(JoinHook):
    def __init__(self, mine: _SyncBatchNorms) -> None:
        self.mine = mine
        self.running: list[dist.Work] = []

    def main_hook(self) -> None:
        """Enqueues a round of zeros. The next hooks, of DDP, must run meanwhile; the round before this one is over."""
        if not self.mine.calls:
            self.mine.check_all_have_a_batch()
        self._wait()
        self.running = [exchange.answer() for exchange in self.mine.exchanges]

    def post_hook(self, is_last_joiner: bool) -> None:
        """Gives every rank of a group the moving statistics of its rank with the most calls."""
        self._wait()
        with self.mine.waiting("at the end, to share the moving statistics"):
            for group in dict.fromkeys(layer.process_group.group for layer in self.mine.layers):
                size, device = group.size(), self.mine.join_device
                best = torch.tensor(self.mine.calls * size + group.rank(), device=device)
                dist.all_reduce(best, dist.ReduceOp.MAX, group)
                for layer in self.mine.layers:
                    if layer.process_group.group is group:
                        for buffer in layer.buffers():
                            dist.broadcast(buffer, group=group, group_src=int(best) % size)

    def _wait(self) -> None:
        with self.mine.waiting("after its last batch, to answer their exchanges"):
            for work in self.running:
                work.wait()
        self.running = []


class _CallHook:
    """The model's forward pre-hook. In a copy of the model it does nothing: a copy is not part of join."""

    def __init__(self, layers: _SyncBatchNorms | None) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if self.layers is not None:
            self.layers.call()

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallHook:
        return _CallHook(None)


def _own(model: nn.Module) -> list[Joinable]:
    return [model] if isinstance(model, Joinable) else []


def _group_inside(comm: Any) -> dist.ProcessGroup:
    """The group in which a layer exchanges inside join: one that it shares with no other user."""
    if isinstance(comm, DefaultGroupCommunicator):
        return comm.group
    if not isinstance(comm, ProcessGroupCommunicator):
        raise ValueError("syncbn.join needs layers whose process_group belongs to torch.distributed, not to MPI")
    return duplicate_of(comm.group)
