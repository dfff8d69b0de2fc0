"""Whether the layers of a test exchange in shared memory or over their groups."""

from __future__ import annotations

import pytest
from torch import Tensor

from syncbn.comm import exchange
from syncbn.comm.identity import GroupState
from syncbn.comm.sharing import Sharing
from syncbn.comm.way import MemoryOrGroup


def over_the_group(patch: pytest.MonkeyPatch) -> None:
    """From now on CPU tensors are exchanged by their group's collectives, as where no memory can be shared. Every rank calls it."""
    sharing = Sharing()
    sharing.reason, sharing.ready = "turned off for this test", True
    way_of = exchange.way_of

    def without_memory(state: GroupState, tensor: Tensor) -> MemoryOrGroup:
        way = way_of(state, tensor)
        return sharing if isinstance(way, Sharing) else way

    patch.setattr(exchange, "way_of", without_memory)
