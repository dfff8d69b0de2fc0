"""Measures an exchange between the GPUs of a node, in each other's memory and over NCCL, in one run:

    torchrun --nproc-per-node 8 -m benchmarks.peers

Each rank needs a GPU of its own. The device's time of an exchange is measured in a captured graph of 100 exchanges, without the host; the
host's time is how long it takes to issue one. The predictions were written down before any run: NOTES.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn import environment
from syncbn.comm import resolve
from syncbn.comm.identity import state_of
from syncbn.comm.peers import PeerExchange

from .launches import graph_microseconds
from .report import Row, table
from .timing import clocks, machine

CHANNELS = (64, 256, 512, 2048)
PREDICTED = {64: 3.5, 256: 3.5, 512: 3.5, 2048: 5.0}  # µs of the device in peer memory, 8 GPUs of a node
PREDICTED_OF_NCCL = "15 to 20"
KEY = ("the benchmark", "exchange", 0, torch.float64, "none", 0.0, None)  # names the exchange in errors
EXCHANGES = 100  # in a graph, and in a sample of the host's time


def host_microseconds(call: Callable[[], object], repeats: int) -> float:
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(EXCHANGES):
            call()
        samples.append((time.perf_counter() - began) * 1e6 / EXCHANGES)
    torch.cuda.synchronize()
    return statistics.median(samples)


def rows(peers: PeerExchange, repeats: int, device: torch.device) -> list[Row]:
    comm, measured = resolve(), []
    for channels in CHANNELS:
        # As many values as a forward exchange has. They are zeros because repeated sums of other values would overflow.
        values = torch.zeros(2 * channels + 4, dtype=torch.float64, device=device)
        calls: dict[str, Callable[[], Tensor]] = {
            "peer memory": lambda values=values: peers.all_reduce_(comm, values, 0, KEY),
            "NCCL": lambda values=values: comm.all_reduce_(values),
        }
        row: Row = {"C": channels}
        for name, call in calls.items():
            row[f"{name}, µs"] = graph_microseconds(call, repeats, EXCHANGES)
        row |= {"predicted": PREDICTED[channels], "predicted of NCCL": PREDICTED_OF_NCCL}
        for name, call in calls.items():
            row[f"{name}, host µs"] = host_microseconds(call, repeats)
        measured.append(row)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="samples of each figure, which is their median")
    args = parser.parse_args()
    here = environment.rank_info()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here.world_size < 2 or gpus < (here.local_world_size or here.world_size):
        if here.rank == 0:
            print(f"needs two ranks or more, and a GPU for each: {here.world_size} ranks, {gpus} GPUs")
        return
    device = syncbn.init_process_group("nccl", timeout=60)
    environment.settings = environment.settings._replace(peer=True)
    comm = resolve()
    peers = state_of(comm.group).way(PeerExchange)
    peers.set_up(comm, device)
    if peers.memory is None:
        print(f"rank {here.rank}: {peers.path}")
    else:
        measured = rows(peers, args.repeats, device)
        if here.rank == 0:
            header: Row = {"machine": machine("cuda"), "ranks": here.world_size, "torch": torch.__version__}
            table("an exchange of 2C + 4 doubles", measured)
            table("machine", [{**header, **clocks("cuda", "after")}])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
