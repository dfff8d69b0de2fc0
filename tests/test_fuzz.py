"""Random shapes, layouts, dtypes, splits of the batch and options, against the float64 oracle; the same ones on every rank.

A short run by default. For a long one: SYNCBN_FUZZ=5000 torchrun --nproc-per-node 3 -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import os

import torch
from conftest import HERE
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_layer import channels_last, check

EXAMPLES = int(os.environ.get("SYNCBN_FUZZ", "150"))

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
splits = st.lists(st.integers(0, 5), min_size=HERE.world_size, max_size=HERE.world_size).map(tuple)
options = st.fixed_dictionaries(
    {},
    optional={
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
        "unbiased": st.booleans(),
        "eps": st.sampled_from([1e-5, 1e-3, 0.5]),
        "activation": st.sampled_from([None, "relu", "leaky_relu", "silu"]),
    },
)


# derandomize: the ranks draw the same examples, and so does the next run; more of them with a larger SYNCBN_FUZZ.
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    shape=shapes,
    counts=splits,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    layout=st.sampled_from([None, channels_last]),
    residual=st.booleans(),
    chosen=options,
)
def test_any_layer_equals_batch_norm_of_the_whole_batch(world, shape, counts, dtype, layout, residual, chosen):
    samples = sum(counts)
    for size in shape[1:]:
        samples *= size
    # Of two or three values xhat is ±1 or so whatever they are, and dx is the difference of equal numbers.
    assume(samples >= 4)
    check(world, counts, shape, dtype, layout=layout, residual=residual, **chosen)
