"""Python processes that start in milliseconds: forked from one that has imported torch, on which each new interpreter spends seconds.

They run a script with an environment, output and exit status of their own, and import syncbn themselves, which reads the environment. They
are not children of the test, and their interpreter, libraries and OMP_NUM_THREADS are those of the server: a test about launchers or about
the import of torch starts real ones.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from support.processes import MARK, job


class Fork:
    """The part of subprocess.Popen that tests use."""

    def __init__(self, report: IO[str]) -> None:
        self._report = report
        self.pid = int(report.readline())

    def wait(self, timeout: float) -> int:
        """The exit status, or -n after signal n."""
        if not select.select([self._report], [], [], max(0, timeout))[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        with self._report:
            return os.waitstatus_to_exitcode(int(self._report.readline()))


class ForkServer:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests

    def start(self, script: Path, *arguments: str, env: Mapping[str, str], stdout: IO, stderr: IO) -> Fork:
        """A process of the job whose mark is in `env`."""
        ours, theirs = os.pipe()
        message = json.dumps([str(script), arguments, dict(env), os.getcwd()]).encode()
        socket.send_fds(self._requests, [message], [stdout.fileno(), stderr.fileno(), theirs])
        os.close(theirs)
        return Fork(open(ours))

    def run(
        self, script: Path, *arguments: str, env: Mapping[str, str], timeout: float, ranks: Sequence[Mapping[str, str]] = ({},)
    ) -> list[subprocess.CompletedProcess[str]]:
        """The script in one process for each of `ranks`, with these further variables, as two_ranks() returns them."""
        deadline = time.monotonic() + timeout
        with job(env) as env, ExitStack() as stack:
            files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ("stdout", "stderr")] for _ in ranks]
            started = [
                self.start(script, *arguments, env=env | rank, stdout=stdout, stderr=stderr)
                for rank, (stdout, stderr) in zip(ranks, files, strict=True)
            ]
            statuses = [process.wait(deadline - time.monotonic()) for process in started]
            return [
                subprocess.CompletedProcess(str(script), status, *(read(file) for file in pair))
                for status, pair in zip(statuses, files, strict=True)
            ]


def read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@contextmanager
def fork_server(env: Mapping[str, str]) -> Iterator[ForkServer]:
    """It ends when the test run does, however that ends: nothing is left to read then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    placeholder = {MARK: uuid.uuid4().hex}  # each process writes its own over it
    with theirs:
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), MARK]
        process = subprocess.Popen(command, env=env | placeholder, stdin=theirs)
    with process, ours:  # the socket is closed first
        yield ForkServer(ours)
