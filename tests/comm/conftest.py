from __future__ import annotations

import pytest

from support import emulated


@pytest.fixture(scope="session")
def peer_library(tmp_path_factory):
    """The library of the emulated peer_all_reduce."""
    if emulated.COMPILER is None:
        pytest.skip("g++ is not on PATH")
    return emulated.build_peers(tmp_path_factory.mktemp("peers"))
