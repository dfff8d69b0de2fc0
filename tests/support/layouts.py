"""The layouts that tests give their inputs."""

from __future__ import annotations

import pytest
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """The same values with dimension 1 fastest in memory, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


contiguous = Tensor.contiguous
LAYOUTS = [contiguous, channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
