"""Compares runs of digits.py: a table, a plot, and exit status 1 if a synchronized run does not follow the one-process run.

python examples/compare.py out/*.json --plot out/digits.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

# Of the test loss, in float64. Rounding alone makes runs differ by 1e-15 at first, and training amplifies it; statistics of two
# images instead of eight move the loss by more than 1e-2 in the first steps.
TOLERANCE = 1e-6


def difference(run: dict, other: dict) -> float:
    """The greatest difference of the two test-loss curves."""
    return max(abs(mine[1] - theirs[1]) for mine, theirs in zip(run["curve"], other["curve"], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="JSON files that digits.py has written")
    parser.add_argument("--plot", type=Path, default=Path("out/digits.png"))
    args = parser.parse_args()

    runs = [json.loads(path.read_text()) for path in args.runs]
    whole = next((run for run in runs if run["ranks"] == 1), None)
    if whole is None:
        parser.error("none of the runs is of one process")

    table = Table("batch normalization", "ranks x images", "accuracy", "test loss", "difference*")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    styles = {"local": dict(color="tab:red"), "sync": dict(color="tab:blue"), "one": dict(color="black", linestyle=":", linewidth=3)}
    followed = True
    for run in sorted(runs, key=lambda run: (run["ranks"] == 1, run["norm"] == "sync")):
        steps, losses, accuracies = zip(*run["curve"], strict=True)
        differs = difference(run, whole)
        label = "one process" if run is whole else {"sync": "SyncBatchNorm", "local": "BatchNorm2d per rank"}[run["norm"]]
        split = f"{run['ranks']} x {run['batch_size']}"
        table.add_row(label, split, f"{accuracies[-1]:.1%}", f"{losses[-1]:.4f}", "" if run is whole else f"{differs:.1e}")
        axes.plot(steps, losses, label=f"{label} ({split} images)", **styles["one" if run is whole else run["norm"]])
        followed &= run is whole or run["norm"] != "sync" or differs <= TOLERANCE
    axes.set(xlabel="step", ylabel="test loss (log scale)", yscale="log", title="Handwritten digits, small ResNet, eight images a step")
    axes.grid(alpha=0.3)
    axes.legend()
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=120)

    console = Console()
    console.print(table)
    console.print("* greatest difference of the test loss from the one-process run, over all steps")
    console.print(f"Plot: {args.plot}", soft_wrap=True)
    if not followed:
        console.print(f"The synchronized run does not follow the one-process run to {TOLERANCE:g}.", style="bold red")
    return 0 if followed else 1


if __name__ == "__main__":
    sys.exit(main())
