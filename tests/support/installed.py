"""The package as if it were installed: torch finds its entry point, whatever the metadata of this environment say."""

from __future__ import annotations

import re
from pathlib import Path

from support import ROOT


def entry_point() -> str:
    (value,) = re.findall(r'\[project.entry-points."torch.backends"\]\nsyncbn = "(.*)"', (ROOT / "pyproject.toml").read_text())
    return value


def with_entry_point(env: dict[str, str], folder: Path) -> dict[str, str]:
    """The environment of a process in which syncbn is installed."""
    info = folder / "syncbn_autoload-0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text(f"[torch.backends]\nsyncbn = {entry_point()}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: syncbn-autoload\nVersion: 0\n")
    path = [str(folder), str(ROOT), env.get("PYTHONPATH", "")]
    return env | {"PYTHONPATH": ":".join(filter(None, path))}
