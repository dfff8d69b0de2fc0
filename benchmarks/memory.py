"""What a training step keeps for its backward pass, its peak, and its time, side by side:  python -m benchmarks.memory

Four variants of each network take turns: torch's batch norms; the same with every block but the last in `torch.utils.checkpoint`;
synchronized layers with fused activations, in a single process; and those in `syncbn.recompute_outputs()`. Memory is counted by storages
that the step's operators make, so the figures do not depend on an allocator. Writes benchmarks/results/memory-MACHINE.json.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import syncbn

from . import timing
from .models import densenet121, resnet50, unet
from .report import Row, save, table


def frozen_resnet50() -> nn.Sequential:
    return syncbn.freeze_bn(resnet50())  # type: ignore[return-value]


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "ResNet-50, 8 x 224²": (resnet50, (8, 3, 224, 224)),
    "ResNet-50, frozen, 8 x 224²": (frozen_resnet50, (8, 3, 224, 224)),
    "U-Net, 2 x 256²": (unet, (2, 3, 256, 256)),
    "DenseNet-121, 8 x 224²": (densenet121, (8, 3, 224, 224)),
}


class Counted(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are alive; and their greatest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        existing = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in existing and t.untyped_storage() not in self.seen:
                self._add(t.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.seen.add(storage)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.bytes -= size


class Checkpointed(nn.Module):
    """Every block but the last is computed again in the backward pass."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model[:-1]:
            x = checkpoint(block, x, use_reentrant=False)
        return self.model[-1](x)


Step = Callable[[], Tensor]


def variants(build: Callable[[], nn.Sequential], x: Tensor) -> dict[str, Step]:
    """name -> a forward pass, whose backward pass ends the step."""
    torch.manual_seed(0)
    model = build().to(x.device)
    fused = syncbn.convert_sync_batchnorm(copy.deepcopy(model), fuse_activation=True)
    calls: dict[str, tuple[nn.Module, bool]] = {
        "BatchNorm2d": (model, False),
        "BatchNorm2d, checkpoint": (Checkpointed(copy.deepcopy(model)), False),
        "SyncBatchNorm, fused": (fused, False),
        "SyncBatchNorm, fused, recompute_outputs": (copy.deepcopy(fused), True),
    }

    def step(model: nn.Module, recompute: bool) -> Tensor:
        with syncbn.recompute_outputs() if recompute else nullcontext():
            return model(x).square().mean()

    for called, recompute in calls.values():  # gradients exist before anything is counted
        step(called, recompute).backward()
    return {name: lambda called=called, recompute=recompute: step(called, recompute) for name, (called, recompute) in calls.items()}  # type: ignore[misc]


def measure(name: str, steps: dict[str, Step], repeats: int, device: str) -> list[Row]:
    rows: dict[str, Row] = {}
    for variant, step in steps.items():
        with Counted() as counted:
            loss = step()
            kept = counted.bytes
            loss.backward()
        rows[variant] = {"network": name, "layers": variant, "kept, MB": kept / 1e6, "peak, MB": counted.peak / 1e6}
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(repeats):
        for variant, step in steps.items():
            times[variant].append(timing.clock(lambda step=step: step().backward(), device, 1))  # type: ignore[misc]
    for variant, row in rows.items():
        row["step, ms"] = statistics.median(times[variant])
        row["time / BatchNorm2d's"] = statistics.median(a / b for a, b in zip(times[variant], times["BatchNorm2d"], strict=True))
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small images and one step, to see that it runs")
    parser.add_argument("--processor-time", action="store_true", help="measure it, not elapsed time, on one thread: for a busy machine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.processor_time:
        timing.use_processor_time()
    rows: list[Row] = []
    for name, (build, (n, channels, *size)) in NETWORKS.items():
        x = torch.randn(n, channels, *((32, 32) if args.quick else size), device=args.device)
        rows += measure(name, variants(build, x), 1 if args.quick else 5, args.device)
    header = {
        "machine": timing.machine(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time": "of the processor" if args.processor_time else "of the clock",
    }
    table("machine", [header])
    table("memory of a training step", rows)
    save(args.out / (re.sub(r"\W+", "-", f"memory {header['machine']}").strip("-") + ".json"), header, {"steps": rows})


if __name__ == "__main__":
    main()
