"""The one comparison of values with bounds. Each kind of test computes the bound in its own way."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float, what: str, nan_where_wanted: bool = False) -> None:
    """|got - want| <= bound, for each element. NaN is wrong; with `nan_where_wanted` it is right exactly where it is wanted."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    bound = torch.as_tensor(bound, dtype=torch.float64, device=want.device).expand_as(want)
    error = (got.detach().to(want.device, torch.float64) - want).abs()
    wrong = ~(error <= bound)
    if nan_where_wanted:
        wrong &= ~(got.isnan() & want.isnan())
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        first = f"{got[where]} instead of {want[where]} at {list(where)}, off by {error[where] / bound[where]:.2g} times the tolerance"
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first {first}")
