"""Measures syncbn against torch in one run:  python -m benchmarks [--device cuda] [--threads 1] [--networks] [--compile]

Writes benchmarks/results/MACHINE.json and .png, on the CPU MACHINE-N-threads. It runs in one process with an initialized group of one rank:
nothing is exchanged, except in the columns that say so, where NCCL is called for the values of one rank.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from syncbn import native

from .cases import KINDS, LARGE, SHAPES, TINY, Inputs, kept_megabytes, layer_calls, op_calls, peak_megabytes, rotations
from .networks import NETWORKS
from .report import Row, geometric_mean, save, table
from .timing import clocks, copy_rate, host_microseconds, keep_memory, machine, medians, rotated, use_processor_time


def shapes(device: str) -> list[tuple[int, ...]]:
    return SHAPES if device == "cpu" else SHAPES + LARGE


def ops_rows(device: str, repeats: int, limit: float) -> list[Row]:
    rows = []
    for shape in shapes(device):
        for kind in KINDS:
            inputs = Inputs(shape, kind, device)
            calls, moved = op_calls(inputs)
            several = rotated([calls, *(op_calls(Inputs(shape, kind, device))[0] for _ in range(1, rotations(inputs)))])
            for name, ms in medians(several, device, repeats, kernels_alone=True).items():
                rate = moved[name] * inputs.megabytes / ms
                row = {"op": name, "shape": str(shape), "kind": kind, "MB": inputs.megabytes, "ms": ms}
                rows.append({**row, "GB/s": rate, "of the copy rate": rate / limit})
    return rows


def layer_rows(device: str, repeats: int, compiled: bool) -> list[Row]:
    rows = []
    for after in ("", "relu", "add relu"):
        for shape in shapes(device):
            for kind in KINDS:
                for direction, calls in layer_calls(Inputs(shape, kind, device), after, compiled).items():
                    ms = medians(calls, device, repeats)
                    row = {"layer": f"BN {after}".strip().replace(" ", " + "), "shape": str(shape), "kind": kind, "pass": direction}
                    rows.append({**row, **{f"{k} ms": v for k, v in ms.items()}, "torch / syncbn": ms["torch"] / ms["syncbn"]})
    return rows


def network_rows(device: str, repeats: int, kinds: list[str], names: list[str]) -> list[Row]:
    """The time of all batch norm layers of a network, each with the ReLU and the addition that follow it: a sum over the layers."""
    rows = []
    for name in names:
        for kind in kinds:
            total: dict[str, float] = {}
            for (shape, after), count in NETWORKS[name]().items():
                for layer, ms in medians(layer_calls(Inputs(shape, kind, device), after)["both"], device, repeats).items():
                    total[layer] = total.get(layer, 0) + count * ms
            row = {"network": name, "kind": kind, "layers": sum(NETWORKS[name]().values())}
            rows.append({**row, **{f"{k} ms": v for k, v in total.items()}, "torch / syncbn": total["torch"] / total["syncbn"]})
            if device == "cuda":
                rows[-1]["exchanging"] = total["torch SyncBatchNorm, exchanging"] / total["syncbn, exchanging"]
    return rows


def other_rows(device: str) -> list[Row]:
    """Host time of a tiny layer, the memory that a layer keeps for its backward pass, and on a GPU its peak memory."""
    rows: list[Row] = []
    for direction, calls in layer_calls(Inputs(TINY, KINDS[0], device)).items():
        times = host_microseconds(calls, device)
        rows.append({"what": f"host µs, {direction}", **times, "syncbn / torch": times["syncbn"] / times["torch"]})
    for after in ("", "relu", "add relu"):
        inputs = Inputs(SHAPES[0], KINDS[0], device)
        rows.append({"what": f"kept MB, BN {after}, x is {inputs.megabytes:.1f}", **kept_megabytes(inputs, after)})
        if device == "cuda":
            rows.append({"what": f"peak MB, BN {after}, x is {inputs.megabytes:.1f}", **peak_megabytes(inputs, after)})
    return rows


def ops_speedups(ops: list[Row]) -> list[Row]:
    """Torch's time over ours, for its one op and our two ops each way: the 12 cases of the targets, four shapes in three kinds. On the
    CPU only."""
    ms = {(r["shape"], r["kind"], r["op"]): r["ms"] for r in ops}
    rows = []
    for shape, kind in {(r["shape"], r["kind"]): None for r in ops if r["kind"] in KINDS[:3]}:
        get = lambda op, case=(shape, kind): ms[(*case, op)]  # noqa: E731
        forward, backward = get("stats") + get("normalize"), get("backward_reduce") + get("backward_input")
        torch_forward, torch_backward = get("torch forward"), get("torch backward")
        both = (torch_forward + torch_backward) / (forward + backward)
        rows.append({"shape": shape, "kind": kind, "forward": torch_forward / forward, "backward": torch_backward / backward, "both": both})
    return rows


def host_figure(host: list[Row]) -> Row:
    """The ratio for a tiny layer in a group of one rank. Its time is that of the host."""
    (both,) = (r for r in host if r["what"] == "host µs, both")
    return {"figure": f"host, {TINY}, forward + backward, syncbn / torch", "value": both["syncbn / torch"], "target": "at most 1.25"}


def summary_cuda(ops: list[Row], networks: list[Row], host: list[Row]) -> list[Row]:
    """The project's targets on a GPU."""
    large = [r for r in ops if r["MB"] >= 25 and "torch" not in r["op"]]
    rows: list[Row] = [
        {
            "figure": f"{op}, maps over 25 MB, least part of the copy rate",
            "value": min(r["of the copy rate"] for r in large if r["op"] == op),
            "target": "0.8",
        }
        for op in dict.fromkeys(r["op"] for r in large)
    ]
    case = (str(LARGE[0]), "contiguous bfloat16")
    ms = {r["op"]: r["ms"] for r in ops if (r["shape"], r["kind"]) == case}
    speedup = ms["torch batch_norm_stats"] / ms["stats"]
    rows.append({"figure": f"stats, {case[0]} {case[1]}, times torch's batch_norm_stats", "value": speedup, "target": "5"})
    for r in networks:
        if r["network"] == next(iter(NETWORKS)):
            figure = f"{r['network']}, {r['kind']}, exchanging, times torch's SyncBatchNorm"
            rows.append({"figure": figure, "value": r["exchanging"], "target": "3"})
    return [*rows, host_figure(host)]


def summary(layers: list[Row], networks: list[Row], ops: list[Row], host: list[Row]) -> list[Row]:
    """The project's targets on a CPU, and figures without a target: the networks, and the ops alone, which explain the layers'."""

    def speedups(layer: str, direction: str, kinds: list[str]) -> list[float]:
        wanted = (layer, direction)
        return [r["torch / syncbn"] for r in layers if (r["layer"], r["pass"]) == wanted and r["kind"] in kinds]

    plain, fused = speedups("BN", "both", KINDS[:3]), speedups("BN + add + relu", "both", KINDS[:3])
    return [
        {"figure": f"forward, {SHAPES[0]} {KINDS[0]}, times torch", "value": speedups("BN", "forward", KINDS[:1])[0], "target": "4"},
        {"figure": "forward + backward, geometric mean of 12, times torch", "value": geometric_mean(plain), "target": "1.5"},
        {"figure": "forward + backward, worst of 12, times torch", "value": min(plain), "target": "0.95"},
        {"figure": "BN + add + ReLU, geometric mean of 12, times torch", "value": geometric_mean(fused), "target": "2"},
        *({"figure": f"{r['network']}, {r['kind']}, times torch", "value": r["torch / syncbn"], "target": ""} for r in networks),
        {"figure": "ops alone, geometric mean of 12, times torch", "value": geometric_mean([r["both"] for r in ops]), "target": ""},
        {"figure": "ops alone, worst of 12, times torch", "value": min(r["both"] for r in ops), "target": ""},
        host_figure(host),
    ]


def over_runs(summaries: list[list[Row]]) -> list[Row]:
    """For each figure, the median, minimum and maximum over all runs."""
    rows = []
    for same in zip(*summaries, strict=True):
        values = [row["value"] for row in same]
        rows.append({**same[0], "value": statistics.median(values), "least": min(values), "greatest": max(values)})
    return rows


def measure(args: argparse.Namespace, repeats: int, limit: float) -> Iterator[tuple[str, list[Row]]]:
    """The sections of one run, each as soon as it is measured: the last run's are printed even if it is interrupted later."""
    ops = ops_rows(args.device, repeats, limit)
    yield "ops", ops
    layers = layer_rows(args.device, repeats, args.compile)
    yield "layers", layers
    networks: list[Row] = []
    if args.networks:
        small = args.device == "cpu"
        names, kinds = (list(NETWORKS)[:1], KINDS[:1]) if small else (list(NETWORKS), [KINDS[0], *KINDS[2:]])
        networks = network_rows(args.device, repeats, kinds, names)
    yield "networks", networks
    host = other_rows(args.device)
    yield "host and memory", host
    if args.device == "cuda":
        yield "summary", summary_cuda(ops, networks, host)
    else:
        speedups = ops_speedups(ops)
        yield "ops, times torch", speedups
        yield "summary", summary(layers, networks, speedups, host)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on the CPU")
    parser.add_argument("--networks", action="store_true", help="also measure the layers of whole networks")
    parser.add_argument("--compile", action="store_true", help="also measure torch's batch norm under torch.compile")
    parser.add_argument("--processor-time", action="store_true", help="measured instead of elapsed time, on one thread: for a busy machine")
    parser.add_argument("--runs", type=int, default=1, help="of everything: the summary has their medians, the rest is from the last run")
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.processor_time and (args.threads != 1 or args.device == "cuda"):  # on a GPU autograd has a thread of its own
        parser.error("--processor-time measures one thread, on the CPU: leave out --threads, and use --device cpu")
    return args


def describe(args: argparse.Namespace, limit: float) -> Row:
    """The machine and the versions that the figures depend on."""
    kernels = next(library for library in native.status() if library.device == args.device)
    return {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "threads": args.threads,
        "copy GB/s": limit,
        "runs": args.runs,
        "time": "of the processor" if args.processor_time else "of the clock",
        "kernels": kernels.reason if kernels.loaded else f"reference: {kernels.reason}",
        **clocks(args.device, "before"),
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_memory()
    if args.processor_time:
        use_processor_time()
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    repeats = 3 if args.quick else 15
    limit = copy_rate(args.device, repeats)
    header = describe(args, limit)
    table("machine", [header])

    summaries: list[list[Row]] = []
    sections: dict[str, list[Row]] = {}
    for run in range(args.runs):
        for name, rows in measure(args, repeats, limit):
            sections[name] = rows
            if rows and name != "summary" and run == args.runs - 1:
                table(name, rows)
        summaries.append(sections["summary"])
    sections["summary"] = over_runs(summaries)
    after = clocks(args.device, "after")
    table("summary", sections["summary"])
    name = re.sub(r"\W+", "-", f"{header['machine']} {args.threads} threads" if args.device == "cpu" else header["machine"]).strip("-")
    save(args.out / name, header | after, sections)
    print(*after.items(), f"written: {args.out / name}.json and .png", sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
