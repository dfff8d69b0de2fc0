from __future__ import annotations

import pytest

from support import emulated


@pytest.fixture(scope="session")
def peer_library(tmp_path_factory):
    """peer_all_reduce of the emulation."""
    if emulated.COMPILER is None:
        pytest.skip("g++ is not on PATH")
    return emulated.build_peers(tmp_path_factory.mktemp("peers"))
