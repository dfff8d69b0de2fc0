"""Two hosts on one machine: network namespaces joined by a pair of virtual interfaces, each with its own host name and /dev/shm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import ROOT

LIMIT = 90  # seconds for the ranks to start, and for all to end: the machine may be busy
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
# torchrun's agent on the host without the rendezvous waits until its kernel gives up the connection: after 15 retransmissions, a quarter
# of an hour. After 5 it is 13 seconds, which leaves the ranks their timeout.
RETRANSMISSIONS = "/proc/sys/net/ipv4/tcp_retries2"
OWN_NAME_AND_MEMORY = 'hostname "$0" && mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def processes(host: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", host, check=False).split()]


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two network namespaces, each with an interface "cable" that leads to the other. Skips the test if they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("ip, of iproute2, is not on PATH")
    names = [f"syncbn-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10)
            if made.returncode != 0:
                pytest.skip(f"no network namespaces here, which only root can make: {made.stderr.strip()}")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("netns", "exec", name, "sh", "-c", f"echo 5 > {RETRANSMISSIONS}")
        yield names
    finally:
        for name in names:
            for pid in processes(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ip("-n", name, "link", "delete", "cable", check=False)  # sockets that still send would keep it
            ip("netns", "delete", name, check=False)


def cut(host: str) -> None:
    """As if the cable were pulled out: one interface down, the other without a carrier, no packet, no word to any connection."""
    ip("-n", host, "link", "set", "cable", "down")


def start(host: str, address: str, ranks: int, script: Path, folder: Path, env: dict[str, str]) -> subprocess.Popen:
    """torchrun's agent of a host, whose ranks run `script folder`."""
    env = env | {"HOSTS": "2", "RANKS": str(ranks), "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "cable"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    here = ["--local-addr", address, "--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}"]  # no name leads to a namespace
    inside = ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c", OWN_NAME_AND_MEMORY, host]
    with (folder / f"{host}.log").open("w") as log:
        return subprocess.Popen(
            [*inside, "launch/torchrun.sh", *here, str(script), str(folder)],
            env=env,
            cwd=ROOT,
            start_new_session=True,
            stdout=log,
            stderr=log,
        )


def wait(until: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not until():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
