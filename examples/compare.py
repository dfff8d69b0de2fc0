"""Compares runs of segmentation.py: a table and a picture. Exit status 1 if the synchronized run diverges from the single-process run,
or does not beat the run that normalizes per rank.

python examples/compare.py out/*.pt --plot out/segmentation.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

Run = dict[str, Any]

# Of the test loss, in float64. Rounding alone makes runs differ by 1e-15 at first, and training amplifies it; statistics of two
# images instead of eight move the loss by more than 1e-2 in the first steps.
TOLERANCE = 1e-6
MARGIN = 0.2  # the least difference of the intersections over union, synchronized minus per rank


def label(run: Run) -> str:
    if run["norm"] == "local":
        return "single process" if run["ranks"] == 1 else "BatchNorm2d per rank"
    return {"sync": "SyncBatchNorm", "group": "GroupNorm"}[run["norm"]]


def images(run: Run) -> str:
    return f"{run['ranks']} x {run['batch_size']}"


def gap(run: Run, whole: Run) -> float:
    """The greatest difference of the test losses that the two runs have recorded."""
    return max(abs(a - b) for a, b in zip(run["curve"], whole["curve"], strict=True))


def draw(runs: list[Run], path: Path) -> None:
    """Rows: the test images on one scale of brightness, the truth, and the masks that the model of each run with several ranks predicts."""
    first = runs[0]
    rows = [("test image", first["images"]), ("truth", first["truth"])]
    rows += [(f"{label(run)}\n{images(run)}, IoU {run['iou']:.2f}", run["predicted"]) for run in runs if run["ranks"] > 1]
    columns, darkest, brightest = len(first["images"]), first["images"].min(), first["images"].max()
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.25 * columns + 2.2, 1.25 * len(rows)), squeeze=False)
    for (name, pictures), line in zip(rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            low, high = (darkest, brightest) if picture.is_floating_point() else (0, 1)
            axis.imshow(picture, cmap="gray", interpolation="nearest", vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.subplots_adjust(left=0.2, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="files that segmentation.py has written")
    parser.add_argument("--plot", type=Path, default=Path("out/segmentation.png"))
    args = parser.parse_args()

    runs = sorted(
        (torch.load(path, weights_only=True) for path in args.runs),
        key=lambda run: (run["norm"] == "group", run["ranks"] == 1, run["norm"]),
    )
    whole = next((run for run in runs if run["ranks"] == 1 and run["norm"] == "local"), None)
    if whole is None:
        parser.error("none of the runs is BatchNorm2d in a single process")

    table = Table(
        "normalization",
        "ranks x images",
        "training loss",
        "test loss",
        "IoU",
        "difference*",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for run in runs:
        differs = "" if run is whole or run["norm"] == "group" else f"{gap(run, whole):.1e}"
        table.add_row(label(run), images(run), f"{run['train_loss']:.3f}", f"{run['test_loss']:.3f}", f"{run['iou']:.2f}", differs)
    draw(runs, args.plot)
    console = Console(width=110)  # so that the table has the same lines on any terminal
    console.print(table)
    console.print(
        "* greatest difference of the test loss from the single process with the whole batch, at every tenth step; float64", soft_wrap=True
    )
    console.print(f"Picture: {args.plot}", soft_wrap=True)

    problems = []
    per_rank = [run["iou"] for run in runs if run["norm"] == "local" and run is not whole]
    for run in (run for run in runs if run["norm"] == "sync"):
        if gap(run, whole) > TOLERANCE:
            problems.append(f"The synchronized run does not follow the single process to {TOLERANCE:g}.")
        if per_rank and run["iou"] < max(per_rank) + MARGIN:
            problems.append(f"The synchronized run does not beat the one per rank by an IoU of {MARGIN}.")
    for problem in problems:
        console.print(problem, style="bold red")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
