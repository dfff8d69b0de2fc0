"""Which collectives torch.distributed runs in a test."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from support.paths import over_the_group
from syncbn import environment

# The methods of ProcessGroup that torch.distributed calls; those with "single" replace others in torch 2.13.
METHODS = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "gather", "scatter", "barrier", "allgather", "_allgather_base"),
    *("all_gather_single", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "alltoall", "alltoall_base"),
    "all_to_all_single",
)


@contextmanager
def collectives():
    """The collectives that Python code calls in this context, as [(operation, elements, dtype)] of what each writes; (operation, 0, None)
    if that is nothing. Layers exchange CPU tensors over their group even if they could share memory, and verify nothing."""
    seen = []
    patched = pytest.MonkeyPatch()
    over_the_group(patched)
    # The verification of a first exchange has tests of its own.
    patched.setattr(environment, "settings", environment.settings._replace(check="off"))
    for name in METHODS:
        original = getattr(dist.ProcessGroup, name, None)

        def spy(group, *args, _name=name, _original=original, **kwargs):
            written = tree_leaves(args[0]) if args else []  # a barrier has options only, by keyword
            seen.append((_name, sum(t.numel() for t in written), written[0].dtype if written else None))
            return _original(group, *args, **kwargs)

        if original is not None:
            patched.setattr(dist.ProcessGroup, name, spy)
    try:
        yield seen
    finally:
        patched.undo()
