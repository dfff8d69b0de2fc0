from __future__ import annotations

import pytest

from support import emulated


@pytest.fixture(scope="module")  # not longer: emulation/ and ptx/ each have a `library` of their own
def kernels(library):
    """The four ops of the folder's `library`."""
    return emulated.Emulated.load(library)
