"""Rows of measurements as tables in the terminal, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = Table(*columns, title=title, title_justify="left")
    for row in rows:
        out.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)))
    Console(width=200).print(out)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def save(path: Path, header: Row, sections: dict[str, list[Row]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({**header, **sections}, indent=1, ensure_ascii=False) + "\n")
    plot(path.with_suffix(".png"), header, sections.get("layers", []))


def plot(path: Path, header: Row, rows: list[Row]) -> None:
    """How many times as fast as torch's plain batch norm each layer is, forward and backward together."""
    rows = [row for row in rows if row["pass"] == "both"]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.6), layout="constrained")
    speedups = [row["torch / syncbn"] for row in rows]
    bars = axes.barh([f"{row['layer']}  {row['shape']}  {row['kind']}" for row in rows], speedups, color="#3b6ea5")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch's unsynchronized layer, forward + backward")
    axes.set_title(f"{header['machine']}, {header['threads']} thread(s), torch {header['torch']}", fontsize=10)
    figure.savefig(path, dpi=120)
