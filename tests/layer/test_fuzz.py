"""Random shapes, layouts, dtypes, splits of the batch and options, against the float64 oracle; the same ones on every rank.

It runs for five seconds. A run of ten minutes: SYNCBN_FUZZ=600 torchrun --nproc-per-node 3 -m pytest tests/layer/test_fuzz.py
"""

from __future__ import annotations

import itertools
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from support.layouts import channels_last
from support.step import check
from support.world import HERE
from syncbn.activation import NAMES

SECONDS = float(os.environ.get("SYNCBN_FUZZ", "5"))

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
splits = st.lists(st.integers(0, 5), min_size=HERE.world_size, max_size=HERE.world_size).map(tuple)
options = st.fixed_dictionaries(
    {},
    optional={
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
        "unbiased": st.booleans(),
        "momentum": st.sampled_from([0.1, 0.3, None]),
        "eps": st.sampled_from([1e-5, 1e-3, 0.5]),
        "activation": st.sampled_from([None, *NAMES]),
    },
)


cases = given(
    shape=shapes,
    counts=splits,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    layout=st.sampled_from([None, channels_last]),
    residual=st.booleans(),
    chosen=options,
)


@pytest.mark.world_size(1, 2, 3, 4)
def test_any_layer_equals_batch_norm_of_the_whole_batch(world, device, time_limit):
    def one(shape, counts, dtype, layout, residual, chosen):
        samples = sum(counts)
        for size in shape[1:]:
            samples *= size
        # dx is orthogonal to 1 and to xhat: of two values nothing but rounding is left, and of three one direction.
        assume(samples >= 4)
        error = None
        try:
            check(world, counts, device, shape, dtype, layout=layout, residual=residual, **chosen)
        except Exception as this_ranks:
            error = f"{type(this_ranks).__name__}: {this_ranks}"
        # If one rank fails, all do, at the same line: so the search for a smaller example keeps them in step.
        if any(world.all_gather(torch.tensor([error is not None]))):
            raise AssertionError(error or "not on this rank")

    end = time.monotonic() + SECONDS
    # The seeds make all ranks and all runs draw the same examples. A run with a larger SYNCBN_FUZZ draws more of them.
    for number in itertools.count():
        time_limit()  # again: the limit is meant for a test of ordinary length
        few = settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        few(seed(number)(cases(one)))()
        if world.all_gather(torch.tensor([time.monotonic() > end]))[0]:  # by rank 0's clock
            break
    print(f"{50 * number + 50} examples")
