"""What a layer costs apart from its kernels:  python -m benchmarks.launches [--device cpu]

On a GPU it counts a layer's launches, and times a layer in a CUDA graph and an op whose input the previous op has left in the cache. On
both devices it times, on the host, a layer so small that its kernels take little time, and splits that into the ops, the exchanges and the
rest. It runs in one process with an initialized group of one rank, in which layers named "exchanging" run their collectives all the same.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from . import timing
from .cases import TINY, Inputs, layer_calls, op_calls, rotations
from .host import host_split
from .report import Row, table
from .timing import clocks, machine, medians, rotated

SMALL = [(2, 256, 56, 56), (2, 1024, 14, 14), (2, 2048, 7, 7)]  # of ResNet-50 at batch 2: outside a graph the device waits for the host
PAIRS = [((2, 256, 56, 56), "float32"), ((8, 64, 112, 112), "bfloat16"), ((8, 64, 112, 112), "float32"),
         ((32, 64, 112, 112), "bfloat16"), ((32, 64, 112, 112), "float32")]  # 6, 13, 26, 51 and 103 MB  # fmt: skip
LAYOUTS = ("contiguous", "channels-last")


def device_events(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that one call launches."""
    call()
    synchronize()
    with torch.profiler.profile() as profile:
        call()
        synchronize()
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in profile.events() or ())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def launch_rows(device: str) -> list[Row]:
    """Launches in a training step of one layer, including the one that counts batches."""
    calls = layer_calls(Inputs(TINY, "contiguous bfloat16", device))
    return [
        {"layer": name, **{f"launches, {way}": device_events(calls[way][name]) for way in ("forward", "backward")}}
        for name in calls["both"]
    ]


def graph_microseconds(call: Callable[[], object], repeats: int, layers: int = 20) -> float:
    """Device time of one of `layers` calls in a graph: without the host's part, with the gaps between kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for before a capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(layers):
            call()
    graph.replay()
    return statistics.median(timing.clock(graph.replay, "cuda", 5) * 1e3 / layers for _ in range(repeats))


def graph_rows(device: str, repeats: int, shapes: Iterable[tuple[int, ...]]) -> list[Row]:
    """Forward and backward. If a layer cannot be captured, the row has the beginning of the reason."""
    rows = []
    for shape in shapes:
        for layout in LAYOUTS:
            row: Row = {"shape": str(shape), "kind": f"{layout} bfloat16"}
            for name, call in layer_calls(Inputs(shape, row["kind"], device))["both"].items():
                try:
                    row[f"{name}, µs"] = graph_microseconds(call, repeats)
                except RuntimeError as error:
                    row[f"{name}, µs"] = str(error).partition("\n")[0][:60]
            rows.append(row)
    return rows


def pair_rows(device: str, repeats: int, pairs: Iterable[tuple[tuple[int, ...], str]]) -> list[Row]:
    """Two ops one after the other on the same input, against each on an input that no cache holds: how much the second op's
    reversed walk gains from the first op's reads."""
    rows = []
    for shape, dtype in pairs:
        for layout in LAYOUTS:
            inputs = Inputs(shape, f"{layout} {dtype}", device)
            several = [op_calls(each)[0] for each in [inputs, *(Inputs(shape, inputs.kind, device) for _ in range(1, rotations(inputs)))]]
            for first, second in (("stats", "normalize"), ("backward_reduce", "backward_input")):
                calls = [{"first": c[first], "second": c[second], "pair": lambda c=c, a=first, b=second: (c[a](), c[b]())} for c in several]
                ms = medians(rotated(calls), device, repeats, kernels_alone=True)
                cold = ms["first"] + ms["second"]
                row = {"ops": f"{first} + {second}", "shape": str(shape), "kind": inputs.kind, "MB": inputs.megabytes}
                rows.append({**row, "cold µs": cold * 1e3, "same input µs": ms["pair"] * 1e3, "same input / cold": ms["pair"] / cold})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="samples of each figure, which is their median")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    header: Row = {"machine": machine(args.device), "torch": torch.__version__, **clocks(args.device, "before")}
    if args.device == "cuda":
        table("two ops, the second on what the first has read", pair_rows(args.device, args.repeats, PAIRS))
        table("launches of a layer", launch_rows(args.device))
    table("host µs of a layer, forward + backward", host_split(Inputs(TINY, "contiguous float32", args.device), args.repeats))
    if args.device == "cuda":
        table("a layer in a CUDA graph, forward + backward", graph_rows(args.device, args.repeats, SMALL))
    table("machine", [{**header, **clocks(args.device, "after")}])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
