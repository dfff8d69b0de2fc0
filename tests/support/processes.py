"""The processes of a job that a test has started, found by a variable in their environment: launchers give their children sessions and
groups of their own, but hand the environment down."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from syncbn import environment

MARK = "SYNCBN_TEST_JOB"
LAUNCHERS_NAMES = {name for row in environment.LAUNCHERS for names in row.columns for name in names}
# Of the other variables of torchrun and of MPI's launchers: an MPI library that saw them would join the job that runs the tests.
_LAUNCHERS_PREFIXES = ("MASTER_", "TORCHELASTIC", "GROUP_", "ROLE_", "PMI", "MPI_", "OMPI", "HYDRA", "PALS")


def without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without a launcher's variables, from which a job that a test starts would take its ranks."""
    return {name: value for name, value in env.items() if name not in LAUNCHERS_NAMES and not name.startswith(_LAUNCHERS_PREFIXES)}


def torchrun(ranks: int = 2) -> list[str]:
    """The torchrun command for this many ranks. Standalone, because torch 2.11 would give concurrent jobs the same port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def torchruns_variables(ranks: int) -> list[dict[str, str]]:
    """The variables that torchrun would set for this many ranks of this host."""
    size = str(ranks)
    same = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def free_port() -> int:
    """One that no connection takes before a job listens on it: the system gives those from 32768 on to connections, also of other jobs."""
    while True:
        port = secrets.randbelow(12000) + 20000
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def two_ranks() -> list[dict[str, str]]:
    return torchruns_variables(2)


def outputs(ended: Iterable[subprocess.CompletedProcess[str]]) -> str:
    """What the ranks of a job have said, for the message of a failure."""
    return "".join(f"\n-- rank {rank} exits with {end.returncode}\n{end.stdout}{end.stderr}" for rank, end in enumerate(ended))


@contextmanager
def job(env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """`env` with a mark that no other job has. At the end all processes that have it are killed."""
    env = {**env, MARK: uuid.uuid4().hex}
    try:
        yield env
    finally:
        kill(env)


def run(command: list[str], *, env: Mapping[str, str], timeout: float, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """subprocess.run, with the output as text, for a command that starts others: in the end, or at the timeout, none of them is left."""
    with job(env) as env:
        return subprocess.run(command, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False)


def marked(env: Mapping[str, str]) -> list[int]:
    """Ids of the living processes with the mark of `env`."""
    entry = f"{MARK}={env[MARK]}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
            alive = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            if alive and entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def left_behind(env: Mapping[str, str], grace: float = 5) -> list[int]:
    """What is still there after `grace` seconds: a launcher may end before the processes that it has told to end."""
    deadline = time.monotonic() + grace
    while (found := marked(env)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def kill(env: Mapping[str, str], grace: float = 5) -> None:
    """Kills the processes with the mark of `env`, and returns when they have ended, or after `grace` seconds."""
    deadline = time.monotonic() + grace
    while (found := marked(env)) and time.monotonic() < deadline:  # again: one may have started another
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
