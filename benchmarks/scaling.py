"""What synchronization costs from 8 to 4096 GPUs: a model, not a measurement.

    python -m benchmarks.scaling          the tables of docs/scaling.md

The times are those by which NCCL itself chooses an algorithm: NVIDIA/nccl 2.30.7, `src/graph/tuning.cc`, `ncclTunerConstantsDefaults`,
`ncclTopoTuneModel` and `ncclTopoGetAlgoTime`. NCCL's constants say nothing about a network's round trip, so the model adds an assumed
number of microseconds to each Ethernet hop. Waiting for the slowest rank, which is often the larger part, is not in the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from syncbn.moments import stats_numel, sums_numel

from .networks import NETWORKS

FLOAT32, FLOAT64 = 4, 8
RANKS = (8, 64, 512, 4096)
CHANNELS = (64, 512, 2048)
NETWORK_OF_A_STEP = "ResNet-50 224², batch 2"

# Microseconds that a collective of any size takes, and that each hop adds, in NCCL's low-latency protocol (LL).
TREE_BASE, RING_BASE = 6.8, 6.6
TREE_HOP_OF_NETWORK, RING_HOP_OF_NETWORK = 5.0, 2.7
# The tree's share of its bandwidth at 64 B, 128 B, 256 B, and so on (LL).
TREE_EFFICIENCY = (1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Estimates for a kernel that stores into the memory of the host's other GPUs: an all-reduce, and a broadcast of a result.
PEER_ALL_REDUCE, PEER_BROADCAST = 4.0, 2.0


class Network(NamedTuple):
    """GPUs of a host, and what joins the hosts."""

    name: str
    gpus: int  # of a host
    gpu_hop: float  # µs between two GPUs of a host, LL
    gpu_bandwidth: float  # GB/s inside a host, over all of NCCL's channels together
    bandwidth: float  # GB/s of a host's network cards together
    overhead: float  # µs to post a message to the network
    round_trip: float = 0.0  # µs that a hop of this network costs beyond NCCL's constants: an assumption


# NVLink 0.6 µs a hop, PCIe 1.0 (tuning.cc, hwLatencies); overhead 1 µs on Intel, 2 µs on AMD (getNetOverhead).
NETWORK_TABLE = (
    Network("8 GPUs a host, NVLink; a 400 Gb/s InfiniBand card for each GPU", 8, 0.6, 370, 370, 1.0),
    Network("8 GPUs a host, NVLink; 100 Gb/s Ethernet over TCP for all of them", 8, 0.6, 370, 12, 1.0, 20.0),
    Network("2 GPUs a host, PCIe; 25 Gb/s Ethernet over TCP", 2, 1.0, 12, 3, 1.0, 25.0),
)
LL_MAX_BANDWIDTH = {1: 141.0, 2: 45.0}  # GB/s on Hopper for 1 and 2 hosts, 35 for more (llMaxBws)


def all_reduce(network: Network, hosts: int, gpus: int, size: float) -> float:
    """µs of an all-reduce of `size` bytes over `gpus` GPUs on each of `hosts`, by the faster of tree and ring."""
    ranks = hosts * gpus
    if ranks == 1:
        return 0.0
    bus, at_most = _bandwidth(network, hosts), LL_MAX_BANDWIDTH.get(hosts, 35.0)
    tree_hop, ring_hop = (base + network.round_trip for base in (TREE_HOP_OF_NETWORK, RING_HOP_OF_NETWORK))
    if gpus == 1:
        ring_hop = tree_hop  # nothing hides the hop
    tree = TREE_BASE + 2 * ((gpus - 1) * network.gpu_hop + math.log2(hosts) * tree_hop)
    efficiency = TREE_EFFICIENCY[min(max(int(math.log2(max(size, 64) / 64)), 0), len(TREE_EFFICIENCY) - 1)]
    tree += size / (1000 * min(bus * 0.92 / 3.8, at_most) * 0.5 * efficiency)
    steps, between_hosts = 2 * (ranks - 1), 2 * (hosts - 1)
    inside = max(network.gpu_hop, network.overhead if hosts > 1 else 0.0)
    ring = RING_BASE + (steps - between_hosts) * inside + between_hosts * ring_hop
    ring += size / (1000 * min(bus * 0.5, at_most) * ranks / steps)
    return min(tree, ring)


def all_gather(network: Network, hosts: int, gpus: int, size: float) -> float:
    """µs of an all-gather of `size` bytes from each rank. In LL the ring is all that NCCL has for it."""
    ranks = hosts * gpus
    steps, between_hosts = ranks - 1, hosts - 1
    inside = max(network.gpu_hop, network.overhead if hosts > 1 else 0.0)
    latency = RING_BASE + (steps - between_hosts) * inside + between_hosts * (RING_HOP_OF_NETWORK + network.round_trip)
    bandwidth = min(_bandwidth(network, hosts) * 0.5, LL_MAX_BANDWIDTH.get(hosts, 35.0)) * ranks / max(steps, 1)
    return latency + ranks * size / (1000 * bandwidth)


def by_host(network: Network, hosts: int, gpus: int, size: float) -> float:
    """µs of a sum inside each host over peer memory, an all-reduce among one GPU of each host, and the result handed out."""
    return PEER_ALL_REDUCE + (all_reduce(network, hosts, 1, size) + PEER_BROADCAST if hosts > 1 else 0.0)


def _bandwidth(network: Network, hosts: int) -> float:
    return network.gpu_bandwidth if hosts == 1 else min(network.gpu_bandwidth, network.bandwidth)


class Way(NamedTuple):
    """How a layer's statistics travel: µs forward and backward for C channels."""

    name: str
    forward: Callable[[Network, int, int, int], float]
    backward: Callable[[Network, int, int, int], float]


def _sums(exchange: Callable[[Network, int, int, float], float], length: Callable[[int], int], width: int) -> Callable[..., float]:
    return lambda network, hosts, gpus, channels: exchange(network, hosts, gpus, width * length(channels))


_FORWARD, _BACKWARD = lambda c: stats_numel(c) - c, sums_numel  # the shifts are not sent
WAYS = (
    Way("syncbn, one all-reduce", _sums(all_reduce, _FORWARD, FLOAT64), _sums(all_reduce, _BACKWARD, FLOAT64)),
    Way("syncbn, by host", _sums(by_host, _FORWARD, FLOAT64), _sums(by_host, _BACKWARD, FLOAT64)),
    Way("torch, all-gather", _sums(all_gather, lambda c: 2 * c + 1, FLOAT32), _sums(all_reduce, lambda c: 2 * c, FLOAT32)),
)


def step(way: Way, network: Network, hosts: int, gpus: int) -> float:
    """ms that the exchanges of all batch norms of a ResNet-50 take in one step, if none is hidden."""
    layers = NETWORKS[NETWORK_OF_A_STEP]()
    both = (way.forward, way.backward)
    return sum(times * sum(f(network, hosts, gpus, shape[1]) for f in both) for (shape, _), times in layers.items()) / 1000


def tables() -> str:
    """The tables in Markdown."""
    parts = []
    for network in NETWORK_TABLE:
        rows = []
        for ranks in RANKS:
            hosts, gpus = max(ranks // network.gpus, 1), min(ranks, network.gpus)
            for way in WAYS:
                exchanges = [way.forward(network, hosts, gpus, channels) for channels in CHANNELS]
                rows.append([str(ranks), way.name, *(f"{t:,.0f}" for t in exchanges), f"{step(way, network, hosts, gpus):,.1f}"])
        head = ["GPUs", "", *(f"C = {channels}, µs" for channels in CHANNELS), "ResNet-50 step, ms"]
        parts.append(f"### {network.name}\n\n{_markdown(head, rows)}")
    return "\n\n".join(parts)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(tables())
