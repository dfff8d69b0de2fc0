"""Which collectives torch.distributed runs in a test."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from support.paths import over_the_group
from syncbn import environment


@contextmanager
def collectives():
    """The collectives that any code calls in this context, as [(operation, elements, dtype)]. Layers use their
    group even if they could share memory, and verify nothing."""
    seen = []
    patched = pytest.MonkeyPatch()
    over_the_group(patched)
    # The verification of a first exchange has tests of its own.
    patched.setattr(environment, "settings", environment.settings._replace(check="off"))
    for name in ("allreduce", "allgather", "_allgather_base", "broadcast", "reduce_scatter", "alltoall", "gather", "barrier"):
        original = getattr(dist.ProcessGroup, name)

        def spy(group, *args, _name=name, _original=original, **kwargs):
            tensors = args[0] if args else []
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            seen.extend((_name, t.numel(), t.dtype) for t in tensors if isinstance(t, torch.Tensor))
            return _original(group, *args, **kwargs)

        patched.setattr(dist.ProcessGroup, name, spy)
    try:
        yield seen
    finally:
        patched.undo()
