"""Python processes that start in milliseconds: they are forked from one that has imported torch, which takes a new interpreter seconds.

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

    def __init__(self, report: IO[str], name: str, timeout: float) -> None:
        """Raises subprocess.TimeoutExpired if the server does not answer."""
        self._report = report
        try:
            self.pid = self._read(f"the start of {name}", timeout)
        except subprocess.TimeoutExpired:
            report.close()  # a process that starts later fails at its report
            raise

    def wait(self, timeout: float) -> int:
        """The exit status, or -n after signal n."""
        status = self._read(f"process {self.pid}", timeout)
        self._report.close()
        return os.waitstatus_to_exitcode(status)

    def _read(self, awaited: str, timeout: float) -> int:
        if not select.select([self._report], [], [], max(0, timeout))[0]:
            raise subprocess.TimeoutExpired(awaited, timeout)
        return int(self._report.readline())


class ForkServer:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests

    def start(self, script: Path, *arguments: str, env: Mapping[str, str], stdout: IO, stderr: IO, timeout: float = 60) -> Fork:
        """A process of the job whose mark is in `env`. The first one waits until the server has imported torch."""
        ours, theirs = os.pipe()
        message = json.dumps([str(script), arguments, dict(env), os.getcwd()]).encode()
        socket.send_fds(self._requests, [message], [stdout.fileno(), stderr.fileno(), theirs])
        os.close(theirs)
        return Fork(open(ours), script.name, timeout)

    def run(
        self, script: Path, *arguments: str, env: Mapping[str, str], timeout: float, ranks: Sequence[Mapping[str, str]] = ({},)
    ) -> list[subprocess.CompletedProcess[str]]:
        """The script in one process for each of `ranks`: the further variables of that process, as two_ranks() returns them."""
        deadline = time.monotonic() + timeout
        with job(env) as env, ExitStack() as stack:
            files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ("stdout", "stderr")] for _ in ranks]
            started = [
                self.start(script, *arguments, env=env | rank, stdout=stdout, stderr=stderr, timeout=deadline - time.monotonic())
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
    """A server that is killed when the context ends. If the test run dies, the server finds the end of its input, and ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    placeholder = {MARK: uuid.uuid4().hex}  # each process writes its own over it
    with theirs:
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), MARK]
        process = subprocess.Popen(command, env=env | placeholder, stdin=theirs)
    with process, ours:
        try:
            yield ForkServer(ours)
        finally:
            process.kill()  # it may hang
