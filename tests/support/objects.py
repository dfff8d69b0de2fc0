"""The emulation's object files, compiled once for all workers and runs: build/emulation keeps them by a hash of what the compiler reads."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from support import ROOT

FOLDER = ROOT / "build" / "emulation"
KEPT_FOR = 7 * 24 * 3600  # seconds since the last use


def compile_once(command: list[str], target: Path, source: str = "") -> None:
    """Runs `command -c -o target`, unless an earlier run has compiled the same preprocessed source with the same command.

    A source that a test makes is the command's standard input: with the name of a temporary file, no command would equal an earlier one.
    """
    read = _run([*command, "-E"], source)
    kept = FOLDER / f"{hashlib.sha256(read + repr(command).encode()).hexdigest()}.o"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of pytest-xdist wait for the one that compiles
        if not kept.exists():
            _remove_unused()
            _run([*command, "-c", "-o", str(kept.with_suffix(".new"))], source)
            kept.with_suffix(".new").rename(kept)
    os.utime(kept)
    shutil.copy(kept, target)


def _remove_unused() -> None:
    for path in FOLDER.iterdir():
        if path.suffix == ".o" and path.stat().st_mtime < time.time() - KEPT_FOR:
            path.unlink(missing_ok=True)


def _run(command: list[str], source: str) -> bytes:
    done = subprocess.run(command, input=source.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
