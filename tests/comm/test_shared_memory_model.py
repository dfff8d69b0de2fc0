"""Every interleaving of a small model of the exchange in shared memory; mutants of the model must be noticed."""

from __future__ import annotations

import pytest

from support.shared_memory_model import Protocol, explore

pytestmark = pytest.mark.world_size(1)
SAME = lambda ranks, exchanges: [[f"layer {e}"] * ranks for e in range(exchanges)]  # noqa: E731
SWAPPED = [["a", "a"], ["a", "b"], ["b", "b"]]
RUNS = {  # (ranks, tags, by segments)
    "2 ranks": (2, SAME(2, 4), False),
    "2 ranks, which differ once": (2, SWAPPED, False),
    "3 ranks": (3, SAME(3, 3), False),
    "3 ranks, of which one differs": (3, [["a", "a", "b"], ["a", "a", "a"]], False),
    "2 ranks by segments": (2, SAME(2, 3), True),
    "3 ranks by segments": (3, SAME(3, 2), True),
    "2 ranks by segments, which differ once": (2, SWAPPED, True),
}
MUTANTS = {  # (protocol, run)
    "one slot": (Protocol(slots=1), "2 ranks"),
    "the epoch before the values": (Protocol(values_first=False), "2 ranks"),
    "no comparison": (Protocol(compares=False), "2 ranks, which differ once"),
    "no comparison by segments": (Protocol(by_segments=True, compares=False), "2 ranks by segments, which differ once"),
    "waits for one rank": (Protocol(waits_for="next"), "3 ranks"),
    "copies results before all have added": (Protocol(by_segments=True, waits_for_results=False), "2 ranks by segments"),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_interleaving_gives_every_rank_the_sums_of_all(name):
    ranks, tags, by_segments = RUNS[name]
    states, wrong = explore(ranks, tags, Protocol(by_segments))
    assert not wrong
    assert states > 300


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_protocol_is_noticed(name):
    protocol, run = MUTANTS[name]
    ranks, tags, _ = RUNS[run]
    assert explore(ranks, tags, protocol)[1]
