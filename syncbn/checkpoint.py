"""Activation checkpointing: a recomputation takes the group's statistics from its own forward pass.

    forward     every layer inside keeps its summed statistics, in order: 3C + 4 numbers each
    recompute   takes them in the same order: no collective, no second update of the moving statistics

A checkpoint inside another one records what the outer one replays. Records belong to one call of `checkpoint`, so any number can
be outstanding, in any order, and a second backward pass (`retain_graph`) replays from the start again.
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


class Record:
    """What the layers inside one checkpoint exchanged, in order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.position = 0  # of the running recomputation

    def record(self, layer: str, stats: Tensor) -> None:
        """Keeps the statistics of `layer` for recomputations."""
        self.entries.append(Entry(layer, stats))

    def replay(self, layer: str, channels: int) -> Tensor:
        """The statistics that `layer` has to use again."""
        if self.position >= len(self.entries):
            raise RuntimeError(f"recomputation of a checkpoint: {layer} was not called in the forward pass ({_ADVICE})")
        recorded, stats = self.entries[self.position]
        if recorded != layer or channels_of(stats) != channels:
            raise RuntimeError(
                f"recomputation of a checkpoint: call {self.position} is {layer} with {channels} channels, but was {recorded}"
                f" with {channels_of(stats)} in the forward pass ({_ADVICE})"
            )
        self.position += 1
        return stats


_ADVICE = "the function must call the same layers in the same order"
# Each thread has its own: CUDA recomputes on autograd's threads.
_recording: ContextVar[tuple[Record, ...]] = ContextVar("recording", default=())
_replaying: ContextVar[Record | None] = ContextVar("replaying", default=None)

records = _recording.get  # those of the checkpoints that this code runs in
replayed = _replaying.get  # that of the checkpoint which this code recomputes, if it has one

Contexts = tuple[AbstractContextManager, AbstractContextManager]


def checkpoint_contexts(context_fn: Callable[[], Contexts] | None = None) -> Contexts:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`, for functions with synchronized layers inside.

    Args:
        context_fn: another one to combine with, such as selective checkpointing's, by `functools.partial`.

    Returns:
        the contexts of the forward pass and of the recomputation.

    Where checkpoints are nested, give it to each of them.

    >>> layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    >>> y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
    >>> y.sum().backward()
    >>> layer.num_batches_tracked
    tensor(1)
    """
    if is_traced_by_make_fx():
        return context_fn() if context_fn else create_selective_checkpoint_contexts(_keep_exchanges)
    record = Record()
    others = context_fn() if context_fn else ()
    return _Together(_forward, record, *others[:1]), _Together(_recompute, record, *others[1:])


def _keep_exchanges(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Under torch.compile, where a checkpoint is a hint to the partitioner: what was exchanged is kept, the rest computed again."""
    return CheckpointPolicy.MUST_SAVE if is_collective_in_graph(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _Together:
    """A context made of another and of one of torch's, that can be entered again: torch enters the recomputation's each time."""

    def __init__(self, ours: Callable[[Record], AbstractContextManager], record: Record, *theirs: AbstractContextManager) -> None:
        self.ours, self.record, self.theirs = ours, record, theirs
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in (*self.theirs, self.ours(self.record)):
                stack.enter_context(context)
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: object) -> bool | None:
        return self.entered.pop().__exit__(*error)  # type: ignore[arg-type]


@contextmanager
def _forward(record: Record) -> Iterator[None]:
    token = _recording.set((*_recording.get(), record))
    try:
        yield
    finally:
        _recording.reset(token)


@contextmanager
def _recompute(record: Record) -> Iterator[None]:
    """What is recorded meanwhile belongs to checkpoints inside this one: theirs come later in this thread's `_recording`."""
    record.position = 0
    token, outer = _replaying.set(record), _recording.set(())
    try:
        yield
    finally:
        _replaying.reset(token)
        _recording.reset(outer)
