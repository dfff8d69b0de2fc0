"""The link between two hosts is cut in mid-step. The hosts are two network namespaces joined by a pair of virtual interfaces."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.world_size(1)
ROOT = Path(__file__).parent.parent
TIMEOUT = 6  # seconds, of the group
LIMIT = 45  # for the ranks to start, and for all to end
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
# torchrun's agent on the host without the rendezvous waits until its kernel gives up the connection: after 15 retransmissions, a quarter
# of an hour. After 5 it is 13 seconds, which leaves the ranks their timeout.
RETRANSMISSIONS = "/proc/sys/net/ipv4/tcp_retries2"

JOB = f"""
import datetime, sys, time, torch, torch.distributed as dist, syncbn
syncbn.init_process_group("gloo", timeout={LIMIT})
rank, group = dist.get_rank(), dist.new_group(timeout=datetime.timedelta(seconds={TIMEOUT}))
layer = syncbn.SyncBatchNorm(3, process_group=group)
layer.layer_name = "encoder.bn"
steps = 0
try:
    while True:
        began = time.time()
        layer(torch.randn(4, 3, 5, requires_grad=True)).sum().backward()
        steps += 1
        if steps == 10:
            open(f"{{sys.argv[1]}}/{{rank}}.steps", "w").close()
except BaseException as error:
    said = f"{{type(error).__name__}} after {{time.time() - began:.1f}} s: {{error}}"
    open(f"{{sys.argv[1]}}/{{rank}}.error", "w").write(said)
    raise
"""


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def processes(host: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", host, check=False).split()]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces, each with an interface "cable" that leads to the other."""
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


def start(host: str, address: str, folder: Path, env: dict[str, str]) -> subprocess.Popen:
    """torchrun's agent of a host, with one rank."""
    env = env | {"HOSTS": "2", "RANKS": "1", "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "cable"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    here = ["--local-addr", address, "--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}"]  # no name leads to a namespace
    with (folder / f"{host}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, "launch/torchrun.sh", *here, str(folder / "job.py"), str(folder)],
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


def test_a_cut_link_ends_every_rank_with_an_error_that_names_its_layer(hosts, tmp_path, subprocess_env):
    (tmp_path / "job.py").write_text(JOB)
    agents = [start(host, address, tmp_path, subprocess_env) for host, address in zip(hosts, ADDRESSES, strict=True)]
    wait(lambda: len(list(tmp_path.glob("*.steps"))) == 2, "the ranks do not train")
    # As when the cable is pulled out: one interface down, the other without a carrier, no packet, no word to any connection.
    ip("-n", hosts[1], "link", "set", "cable", "down")
    wait(lambda: all(agent.poll() is not None for agent in agents), "torchrun goes on")
    assert all(agent.returncode != 0 for agent in agents)
    assert [processes(host) for host in hosts] == [[], []]
    for rank in range(2):
        said = (tmp_path / f"{rank}.error").read_text()
        assert re.match(r'RuntimeError after [\d.]+ s: layer "encoder\.bn" \(SyncBatchNorm\(3\)\): ', said)
        assert re.search(r"could not complete its (forward|backward) exchange of 3 channels .*with the other ranks", said)
        assert f"rank {rank} of 2" in said
        assert float(said.split()[2]) < TIMEOUT + 4, said
