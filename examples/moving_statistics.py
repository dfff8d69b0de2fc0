"""Plots a batch norm's moving statistics during training against the exact ones.

    torchrun --nproc-per-node 4 examples/moving_statistics.py --out docs/moving_statistics.png

Two small networks learn to read digits with 2 images per rank: one with local batch norm, one with synchronized. For one channel of a
layer in the middle, the plot shows at each step the statistics of the ranks' batches, with synchronized layers also those of the group's
batch, and the moving statistics that inference would use. Every few steps it also shows the exact statistics over all images, which
`syncbn.update_bn_stats` computes on a copy of the model.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import syncbn
from syncbn import ops, reference

LAYER, CHANNEL = 4, 2  # of the network below
MOMENTUM = 0.05


def network(synchronized: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, momentum=MOMENTUM),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16, momentum=MOMENTUM),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )
    return syncbn.convert_sync_batchnorm(model) if synchronized else model


def of_channel(stats: Tensor) -> tuple[float, float]:
    """mean and variance of the channel, from sums."""
    mean, var, _ = reference.finalize(stats, 0.0)
    return mean[CHANNEL].item(), var[CHANNEL].item()


def train(synchronized: bool, images: Tensor, labels: Tensor, steps: int, batch_size: int) -> dict[str, list[list[float]]]:
    """Rows of [step, mean, variance, ...] for each kind of statistic. "batch" and "moving" have a pair for each rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = images.device
    model = network(synchronized).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the option; older versions lack the new name
        # Local batch norms keep this rank's statistics: no broadcast of rank 0's buffers.
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    layer = model[LAYER]
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(ops.stats(args[0].detach(), False)) if layer.training else None)
    order = torch.Generator().manual_seed(0)
    curves: dict[str, list[list[float]]] = {"batch": [], "group": [], "moving": [], "exact": []}
    for step in tqdm(range(steps), disable=rank > 0, desc="synchronized" if synchronized else "local"):
        if step % max(steps // 12, 1) == 0:
            exact = copy.deepcopy(model)
            syncbn.update_bn_stats(exact, images[rank::world_size].split(150), progress=False)
            curves["exact"].append([step, exact[LAYER].running_mean[CHANNEL].item(), exact[LAYER].running_var[CHANNEL].item()])
        rows = torch.randperm(len(images), generator=order)[: batch_size * world_size].view(world_size, -1)[rank].to(device)
        optimizer.zero_grad()
        F.cross_entropy(parallel(images[rows]), labels[rows]).backward()
        optimizer.step()
        batch = seen.pop()
        moving = torch.stack([layer.running_mean[CHANNEL], layer.running_var[CHANNEL]]).double()
        all_ranks = [torch.empty_like(torch.cat([batch, moving])) for _ in range(world_size)]
        dist.all_gather(all_ranks, torch.cat([batch, moving]))
        curves["batch"].append([step, *(value for row in all_ranks for value in of_channel(row[:-2]))])
        curves["group"].append([step, *of_channel(torch.stack(all_ranks).sum(0)[:-2])])
        curves["moving"].append([step, *(value for row in all_ranks for value in row[-2:].tolist())])
    return curves


def draw(runs: dict[str, dict[str, list[list[float]]]], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, sharey="row", layout="constrained")
    for column, (name, curves) in enumerate(runs.items()):
        for row, quantity in enumerate(("mean", "variance")):
            axis = axes[row, column]
            table = {kind: torch.tensor(values, dtype=torch.float64) for kind, values in curves.items()}
            steps = table["batch"][:, 0]
            for kind, style, label in (
                ("batch", {"linestyle": "", "marker": ".", "markersize": 2, "color": "#c8c8c8"}, "batch of a rank"),
                ("group", {"linewidth": 0.9, "color": "#3d85c6"}, "batch of the group"),
                ("moving", {"linewidth": 1.8, "color": "#d1495b"}, "moving (one line a rank)"),
            ):
                lines = table[kind][:, 1 + row :: 2]
                if kind != "group" or name.startswith("Synchronized"):
                    axis.plot(steps, lines, **style, label=[label] + ["_"] * (lines.shape[1] - 1))
            axis.plot(table["exact"][:, 0], table["exact"][:, 1 + row], "o", color="black", markersize=5, label="exact (update_bn_stats)")
            axis.grid(alpha=0.25)
            spread = table["group"][:, 1 + row]
            low, high = axis.get_ylim() if axis.get_ylim() != (0, 1) else (0, 0)
            margin = 1.5 * (spread.max() - spread.min())
            axis.set_ylim(max(low, spread.min() - margin), min(high, spread.max() + margin))
            if row == 0:
                axis.set_title(name)
            if column == 0:
                axis.set_ylabel(f"{quantity} of the channel")
            if row == 1:
                axis.set_xlabel("training step")
    legend = figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    legend.legend_handles[0].set_markersize(6)
    legend.legend_handles[1].set_linewidth(2)
    figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/moving_statistics.png"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank (default: 2)")
    args = parser.parse_args()
    device = syncbn.init_process_group()
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16, torch.tensor(y, device=device)
    runs = {
        name: train(synchronized, images, labels, args.steps, args.batch_size)
        for name, synchronized in (("Local batch norm", False), ("Synchronized batch norm", True))
    }
    if dist.get_rank() == 0:
        draw(runs, f"One channel while learning digits: {dist.get_world_size()} ranks x {args.batch_size} images", args.out)
        print(args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
