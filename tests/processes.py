"""The processes of a job that a test has started, found by a mark in their environment: launchers give their children sessions and
groups of their own, but hand the environment down."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def marked(mark: str) -> list[int]:
    """Ids of the living processes with `mark` in their environment, this one excepted."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            if alive and mark.encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is another user's
    return found


def left_behind(mark: str, grace: float = 5) -> list[int]:
    """What is still there after `grace` seconds: a launcher may end before those that it has told to."""
    deadline = time.monotonic() + grace
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def kill(mark: str) -> None:
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
