"""The model of docs/scaling.md: the tables are the program's, and the program follows NCCL's formulas."""

import pytest

from benchmarks.scaling import NETWORK_TABLE, WAYS, all_gather, all_reduce, by_host, step, tables
from support import ROOT

pytestmark = pytest.mark.world_size(1)
DOCS = ROOT / "docs"
NVLINK = NETWORK_TABLE[0]


def test_the_tables_in_the_docs_are_those_of_the_program():
    assert tables() in (DOCS / "scaling.md").read_text()


@pytest.mark.parametrize(
    "hosts, gpus, microseconds",
    [
        (1, 1, 0),  # a single rank has no exchange
        (1, 2, 6.6 + 2 * 0.6),  # the ring: 2 (R - 1) hops
        (1, 8, 6.6 + 14 * 0.6),
        (8, 8, 6.8 + 2 * (7 * 0.6 + 3 * 5.0)),  # the tree: along a host's GPUs, then log2(hosts) hops, twice
        (512, 8, 6.8 + 2 * (7 * 0.6 + 9 * 5.0)),
    ],
)
def test_an_empty_all_reduce_takes_nccls_latency(hosts, gpus, microseconds):
    assert all_reduce(NVLINK, hosts, gpus, 0) == pytest.approx(microseconds)


def test_an_empty_all_gather_takes_a_hop_for_each_rank():
    assert all_gather(NVLINK, 8, 8, 0) == pytest.approx(6.6 + (63 - 7) * 1.0 + 7 * 2.7)


def test_an_all_reduce_grows_with_the_logarithm_of_the_hosts_and_an_all_gather_with_the_ranks():
    size = 8 * 4098
    reduced = [all_reduce(NVLINK, hosts, 8, size) for hosts in (64, 128, 256)]
    gathered = [all_gather(NVLINK, hosts, 8, size / 2) for hosts in (64, 128, 256)]
    assert reduced[2] - reduced[1] == pytest.approx(reduced[1] - reduced[0])
    assert gathered[2] - gathered[1] == pytest.approx(2 * (gathered[1] - gathered[0]), rel=0.01)


def test_each_layer_sends_what_the_docs_say():
    def of_128_channels(way):
        return way.forward(NVLINK, 8, 8, 128), way.backward(NVLINK, 8, 8, 128)

    syncbn, _, torch = WAYS
    assert of_128_channels(syncbn) == tuple(all_reduce(NVLINK, 8, 8, 8 * values) for values in (2 * 128 + 4, 2 * 128 + 2))
    assert of_128_channels(torch) == (all_gather(NVLINK, 8, 8, 4 * (2 * 128 + 1)), all_reduce(NVLINK, 8, 8, 4 * 2 * 128))


def test_going_by_host_saves_time_inside_one_host_only():
    assert by_host(NVLINK, 1, 8, 1000) < all_reduce(NVLINK, 1, 8, 1000) / 3
    assert by_host(NVLINK, 8, 8, 1000) > 0.9 * all_reduce(NVLINK, 8, 8, 1000)


def test_a_step_has_two_exchanges_for_each_of_53_layers():
    one = all_reduce(NVLINK, 1, 8, 0)
    assert step(WAYS[0], NVLINK, 1, 8) == pytest.approx(106 * one / 1000, rel=0.05)  # and what the bytes take
