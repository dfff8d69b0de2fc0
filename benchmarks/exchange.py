"""Measures an exchange on one host, and what it adds to a step, for each path in one run:  python -m benchmarks.exchange [--quick]

Starts mpirun with 2 and 4 ranks of one thread each. In each run gloo, MPI and shared memory take turns, first with 50 exchanges each, then
with one training step each: of a small ResNet, and with 4 ranks also of the U-Net of launch/quickstart.sh. Three more variants of each
model show what a step's time is made of. "BatchNorm2d" has torch's layers. In "BatchNorm2d, meeting" their ranks exchange nothing either,
but wait for each other at each batch norm, both ways, as any synchronized layer must. In "alone" each rank normalizes its own batch by
this package's layer.
Writes benchmarks/results/exchange-MACHINE-N-cores.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from examples.segmentation import IMAGE, UNet
from syncbn import environment
from syncbn.comm import resolve
from syncbn.comm.exchange import LayerExchanges
from syncbn.comm.identity import state_of
from syncbn.comm.sharing import Sharing

from .report import Row, save, table
from .timing import machine

CHANNELS = (64, 512, 2048)
RANKS = (2, 4)
TURN = 50  # exchanges; the first few take longer: threads of the previous path still run, and its data fill the caches
GOALS = {  # (ranks, path at C = 64) -> µs at most; (ranks, model) -> at most this many times a step with BatchNorm2d
    (2, "gloo group, shared"): 3.0,
    (4, "gloo group, shared"): 100.0,
    (2, "MPI, shared"): 3.0,
    (2, "ResNet, 224²"): 1.03,
    (2, "ResNet, 64²"): 1.10,
    (4, "ResNet, 64²"): 1.25,
    (4, "quickstart"): 1 / 0.6,
}


# ---- On each rank -----------------------------------------------------------------------------------------------------------------


def groups() -> dict[str, Any]:
    """Values for a layer's process_group: name -> group. Half of the groups are forbidden to share memory."""
    from mpi4py import MPI

    made: dict[str, Any] = {}
    for name, shares in (("", "0"), (", shared", "1")):
        environment.reload({**os.environ, "SYNCBN_SHARED_MEMORY": shares})
        made[f"gloo group{name}"], made[f"MPI{name}"] = dist.new_group(), MPI.COMM_WORLD.Dup()
        for key in ("gloo group", "MPI"):  # the first exchange reads the variable
            syncbn.SyncBatchNorm(1, process_group=made[key + name])(torch.randn(4, 1))
    environment.reload()
    return made


Samples = dict[str, list[float]]


def exchanges(made: dict[str, Any], channels: int, turns: int) -> Samples:
    """Microseconds of a plain sum of 2 * channels + 1 values, about as many as a layer exchanges backward. They include verification and
    waiting."""
    layers = {name: LayerExchanges(resolve(group), "benchmark", torch.float32, "samples", 1e-5, None) for name, group in made.items()}
    payloads = {name: _payload(exchange, channels) for name, exchange in layers.items()}
    samples: Samples = {name: [] for name in layers}
    for _ in range(turns):
        for name, exchange in layers.items():
            for _ in range(TURN):
                values = payloads[name].clone()
                began = time.perf_counter()
                exchange.all_reduce_(values, "forward")
                samples[name].append((time.perf_counter() - began) * 1e6)
    return samples


def _payload(exchange: LayerExchanges, channels: int) -> Tensor:
    """2 * channels + 1 zeros, and the tag and its square by which the exchange is verified."""
    values = torch.zeros(2 * channels + 1, dtype=torch.float64)
    tag = exchange.ticket(values, "forward", values.numel()).tag
    return torch.cat([values, torch.tensor([tag, tag * tag], dtype=torch.float64)])


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(before, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_resnet() -> nn.Module:
    """A ResNet with 15 batch norms."""
    widths = (32, 32, 64, 64, 128, 128, 256)
    blocks = [Block(before, width, 1 + (before != width)) for before, width in zip((32, *widths), widths, strict=False)]
    stem = [nn.Conv2d(3, 32, 7, 4, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


class Meeting(torch.autograd.Function):
    """Returns x. Both ways the ranks wait for each other in shared memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wait: Callable[[], None]) -> Tensor:
        wait()
        ctx.wait = wait
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.wait()
        return dy, None


def meet_in_batch_norms(model: nn.Module, group: Any) -> nn.Module:
    """Before each batch norm the ranks of `group`, which shares memory, wait for each other."""
    sharing = state_of(resolve(group).group).way(Sharing)
    nothing = torch.zeros(1, dtype=torch.float64)
    memory, timeout = sharing.memory, sharing.timeout
    assert sharing.in_one_memory and memory is not None
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args: Meeting.apply(args[0], lambda: memory.all_reduce_(nothing, 0, timeout)))
    return model


class Model(NamedTuple):
    """A model to train, and the two images of each rank."""

    make: Callable[[], nn.Module]
    x: Tensor


def models_of(ranks: int) -> dict[str, Model]:
    models = {f"ResNet, {size}²": Model(small_resnet, torch.randn(2, 3, size, size)) for size in (224, 64)}
    models["quickstart"] = Model(lambda: UNet().double(), torch.randn(2, 1, IMAGE, IMAGE, dtype=torch.float64))
    return {name: models[name] for with_ranks, name in GOALS if with_ranks == ranks and name in models}


def steps(made: dict[str, Any], model: Model, repeats: int) -> Samples:
    """Milliseconds of a training step, over each path and without any."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    models = {"BatchNorm2d": model.make(), "alone": syncbn.convert_sync_batchnorm(model.make(), alone)}
    models["BatchNorm2d, meeting"] = meet_in_batch_norms(model.make(), made["gloo group, shared"])
    for name, group in made.items():
        models[name] = syncbn.convert_sync_batchnorm(model.make(), group)
    calls = {name: DistributedDataParallel(model) for name, model in models.items()}
    samples: Samples = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for n in range(repeats + 2):
        shuffler.shuffle(order)  # so that no model always follows the same one; alike on all ranks
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            calls[name](model.x).square().mean().backward()
            if n >= 2:
                samples[name].append((time.perf_counter() - began) * 1e3)
    return samples


def summaries(row: Row, samples: Samples) -> list[Row]:
    """The median, and the 10th percentile: what a sample takes if nothing else seems to run on the machine."""
    return [
        {**row, "of the samples": figure, **{name: statistics.quantiles(values, n=10)[tenth - 1] for name, values in samples.items()}}
        for figure, tenth in (("median", 5), ("10%", 1))
    ]


def rank_main(quick: bool) -> None:
    torch.set_num_threads(1)
    syncbn.init_process_group("gloo", timeout=300)
    ranks = dist.get_world_size()
    made = groups()
    rows: list[Row] = []
    for channels in CHANNELS:
        rows += summaries({"what": "exchange, µs", "ranks": ranks, "C": channels}, exchanges(made, channels, 4 if quick else 40))
    for name, model in models_of(ranks).items():
        rows += summaries({"what": "step, ms", "ranks": ranks, "model": name}, steps(made, model, 2 if quick else 30))
    if dist.get_rank() == 0:
        print(json.dumps(rows), flush=True)
    dist.destroy_process_group()


# ---- The run ----------------------------------------------------------------------------------------------------------------------


def run(ranks: int, quick: bool) -> list[Row]:
    command = ["mpirun", "-n", str(ranks), sys.executable, "-m", "benchmarks.exchange", "--rank", *(["--quick"] if quick else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(rows: list[Row]) -> list[Row]:
    """The times of the other variants' steps, divided by those of steps with BatchNorm2d."""
    steps = [row for row in rows if row["what"] == "step, ms"]
    same = ("ranks", "model", "of the samples")
    paths = [name for name in (steps[0] if steps else {}) if name not in (*same, "what", "BatchNorm2d")]
    return [{**{name: r[name] for name in same}, **{name: r[name] / r["BatchNorm2d"] for name in paths}} for r in steps]


def against_goals(rows: list[Row], ratio_rows: list[Row]) -> list[Row]:
    medians = [r for r in rows + ratio_rows if r["of the samples"] == "median"]
    figures = {(r["ranks"], name): r[name] for r in medians if r.get("C") == CHANNELS[0] for name in r if isinstance(r[name], float)}
    models = {(r["ranks"], r["model"]): r["gloo group, shared"] for r in medians if "model" in r and "what" not in r}
    figures |= models
    words = {True: "step / BatchNorm2d's, {}", False: "exchange of 129 values, µs, {}"}
    return [
        {"figure": words[(ranks, what) in models].format(what), "ranks": ranks, "value": figures[ranks, what], "goal": f"<= {most:.3g}"}
        for (ranks, what), most in GOALS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it runs")
    parser.add_argument("--rank", action="store_true", help="be one of the ranks that mpirun starts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.rank:
        return rank_main(args.quick)
    header = {"machine": machine("cpu"), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    header["load before"] = round(os.getloadavg()[0], 1)
    rows = [row for ranks in RANKS for row in run(ranks, args.quick)]
    sections = {
        "exchanges": [row for row in rows if "C" in row],
        "steps": [row for row in rows if "model" in row],
        "step / BatchNorm2d's": ratios(rows),
    }
    sections["goals"] = against_goals(rows, sections["step / BatchNorm2d's"])
    table("machine", [header])
    for name, section in sections.items():
        table(name, section)
    path = args.out / (re.sub(r"\W+", "-", f"exchange {header['machine']} {header['cores']} cores").strip("-") + ".json")
    save(path, header, sections)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
