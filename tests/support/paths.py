"""Whether the layers of a test exchange in shared memory or over their groups."""

from __future__ import annotations

import pytest

from syncbn.comm import exchange
from syncbn.comm.sharing import Sharing


def over_the_group(patch: pytest.MonkeyPatch) -> None:
    """From now on every group's collectives are used, as where no memory can be shared. Every rank calls it."""
    sharing = Sharing()
    sharing.reason, sharing.ready = "turned off for this test", True
    way = exchange.Exchange._way
    patch.setattr(exchange.Exchange, "_way", lambda self, kind, *where: sharing if kind is Sharing else way(self, kind, *where))
