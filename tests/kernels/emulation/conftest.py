from __future__ import annotations

import pytest

from support import emulated


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"))
