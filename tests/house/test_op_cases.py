"""The table of cases by which every kernel is compared with the reference."""

from __future__ import annotations

import itertools

import pytest

from support.op_cases import ALWAYS, AXES, drawn

pytestmark = pytest.mark.world_size(1)
CASES = [{"channels_last": last, "dtype": dtype} | drawn(n) for n, (_, last, dtype, _) in enumerate(ALWAYS)]


@pytest.mark.parametrize("axes", itertools.combinations(["channels_last", "dtype", *AXES], 2), ids="-".join)
def test_every_two_choices_of_two_axes_meet(axes):
    """If two axes took turns together, a fault that needs another combination would never be seen."""
    met = {tuple(case[axis] for axis in axes) for case in CASES}
    assert met == set(itertools.product(*({case[axis] for case in CASES} for axis in axes)))
    assert all({case[axis] for case in CASES} == set(AXES[axis]) for axis in axes if axis in AXES)
