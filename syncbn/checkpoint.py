"""Activation checkpointing: a recomputation takes the group's statistics from the forward pass that it repeats.

    forward     every layer that normalizes by the batch logs its summed statistics, in order: 3C + 4 values each
    recompute   replays them in the same order, without an exchange or a second update of the moving statistics

A checkpoint inside another logs again what the other's recomputation replays. Each call of `checkpoint` has a log of its own, so
any number of them can be outstanding, in any order, and a second backward pass (`retain_graph`) replays from the start again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ._torch_private import is_collective_in_graph, is_traced_by_make_fx
from .moments import channels_of


class Entry(NamedTuple):
    """The summed statistics of one call of a layer."""

    layer: str
    stats: Tensor


class Log:
    """The statistics by which the layers inside one checkpoint have normalized, in order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.position = 0  # of the recomputation in progress

    def append(self, layer: str, stats: Tensor) -> None:
        """Keeps the statistics of `layer` for recomputations."""
        self.entries.append(Entry(layer, stats))

    def replay(self, layer: str, channels: int) -> Tensor:
        """The statistics that `layer` has to use again."""
        if self.position >= len(self.entries):
            raise RuntimeError(f"recomputation of a checkpoint: {layer} is called more often than in the forward pass ({_ADVICE})")
        logged, stats = self.entries[self.position]
        if logged != layer or channels_of(stats) != channels:
            raise RuntimeError(
                f"recomputation of a checkpoint: call {self.position} is {layer} with {channels} channels, but was {logged}"
                f" with {channels_of(stats)} in the forward pass ({_ADVICE})"
            )
        self.position += 1
        return stats


_ADVICE = "the function must call the same layers in the same order"
# Context variables, because each thread needs its own values: for CUDA tensors autograd's threads recompute.
_logging: ContextVar[tuple[Log, ...]] = ContextVar("logging", default=())
_replaying: ContextVar[Log | None] = ContextVar("replaying", default=None)

logs = _logging.get  # of the checkpoints that this code runs in
replayed = _replaying.get  # the log of the checkpoint that this code recomputes, or None

Contexts = tuple[AbstractContextManager, AbstractContextManager]


def checkpoint_contexts(context_fn: Callable[[], Contexts] | None = None) -> Contexts:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`, for functions with synchronized layers inside.

    Args:
        context_fn: another such function to combine with, such as selective checkpointing's. `functools.partial` passes it.

    Returns:
        the contexts of the forward pass and of the recomputation.

    If checkpoints are nested, give it to each of them. In a compiled graph another `context_fn` alone decides what is kept: unless it keeps
    the exchanges, they are repeated.

    >>> layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    >>> y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
    >>> y.sum().backward()
    >>> layer.num_batches_tracked
    tensor(1)
    """
    if is_traced_by_make_fx():
        return context_fn() if context_fn else create_selective_checkpoint_contexts(_keep_exchanges)
    log = Log()
    others = context_fn() if context_fn else ()
    return _Together(_forward, log, *others[:1]), _Together(_recompute, log, *others[1:])


def _keep_exchanges(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Under torch.compile, where a checkpoint is a hint to the partitioner: what was exchanged is kept, the rest computed again."""
    return CheckpointPolicy.MUST_SAVE if is_collective_in_graph(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _Together:
    """One of our contexts inside the one of `context_fn`. torch enters it again for each recomputation."""

    def __init__(self, ours: Callable[[Log], AbstractContextManager], log: Log, *theirs: AbstractContextManager) -> None:
        self.ours, self.log, self.theirs = ours, log, theirs
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in (*self.theirs, self.ours(self.log)):
                stack.enter_context(context)
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: object) -> bool | None:
        return self.entered.pop().__exit__(*error)  # type: ignore[arg-type]


@contextmanager
def _forward(log: Log) -> Iterator[None]:
    token = _logging.set((*_logging.get(), log))
    try:
        yield
    finally:
        _logging.reset(token)


@contextmanager
def _recompute(log: Log) -> Iterator[None]:
    """In this context only the checkpoints that are entered inside it log statistics."""
    log.position = 0
    token, outer = _replaying.set(log), _logging.set(())
    try:
        yield
    finally:
        _replaying.reset(token)
        _logging.reset(outer)
