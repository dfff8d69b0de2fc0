"""Real processes that fail: the others end with an error within the timeout that names the layer, the launcher ends non-zero, and
no process is left behind."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import kill, left_behind

pytestmark = pytest.mark.world_size(1)
ROOT = Path(__file__).parent.parent
TIMEOUT = 6  # seconds, of the group
LIMIT = 60  # of the whole job

JOB = """
import os, signal, socket, sys, time, torch, syncbn
from torch import nn
{start}
a, b = syncbn.SyncBatchNorm(3, process_group=group), syncbn.SyncBatchNorm(3, process_group=group)
a.layer_name, b.layer_name = "encoder.a", "encoder.b"
def step(*layers):
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y)
    y.sum().backward()
step(a, b)
open(f"{{sys.argv[1]}}/{{rank}}", "w").close()
began = time.time()
try:
{fault}
except BaseException as error:
    said = f"{{type(error).__name__}} after {{time.time() - began:.1f}} s: {{error}}"
    open(f"{{sys.argv[1]}}/{{rank}}.error", "w").write(said)
    time.sleep(rank * {linger})
    raise
"""
TORCHRUN = f"""
import torch.distributed as dist
syncbn.init_process_group("gloo", timeout={TIMEOUT})
rank, group = dist.get_rank(), None
def cut_connections():
    for fd in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(fd)))
            connection.getpeername()  # an error where it only listens
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
"""
MPI = """
from mpi4py import MPI
group = MPI.COMM_WORLD
rank = group.rank
"""

# What rank 1 does while rank 0 takes further steps, and which words rank 0's error must have.
NAMES_THE_LAYER = ["RuntimeError", "encoder.a", "forward", "rank 0 of 2"]
FAULTS = {
    "raises before its collective": ("raise ValueError('no more')", NAMES_THE_LAYER),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", NAMES_THE_LAYER),
    "is stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", NAMES_THE_LAYER),
    "leaves the loop early": (f"time.sleep({4 * TIMEOUT})", NAMES_THE_LAYER),
    "skips a layer": ("step(b)", ["RankMismatchError", "forward of encoder.a", "forward of encoder.b"]),
    "calls layers in another order": ("step(b, a)", ["RankMismatchError", "forward of encoder.a", "forward of encoder.b"]),
    "has another C": (
        "a = syncbn.SyncBatchNorm(5, process_group=group); a.layer_name = 'encoder.a'; a(torch.randn(4, 5, 5))",
        ["RankMismatchError", "7 numbers", "11 numbers"],
    ),
    "has another dtype": ("a(torch.randn(4, 3, 5).double())", ["RankMismatchError", "torch.float32", "torch.float64"]),
}
# A collective of rank 1 that fails by itself. It stays for a while, so that the launcher does not end rank 0 before its error.
FAILURES = {
    "raises": (["torchrun", "mpirun"], "type(syncbn.comm.resolve(group)).all_reduce_ = lambda *_: 1 / 0"),
    "has lost its connections": (["torchrun"], "cut_connections()"),
    "has lost its communicator": (["mpirun"], "syncbn.comm.resolve(group).group.comm.Free()"),
}


def launch(launcher: str, fault: str, folder: Path, env: dict[str, str], check: str, linger: int = 0) -> tuple[int, list[int]]:
    """(exit status, processes left behind) of a job of two ranks. It ends by itself, or is killed after LIMIT."""
    script = folder / "job.py"
    body = f"if rank == 1:\n    {fault}\nstep(a, b)"
    script.write_text(JOB.format(start=TORCHRUN if launcher == "torchrun" else MPI, fault=textwrap.indent(body, "    "), linger=linger))
    command = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"],
        "mpirun": ["mpirun", "-n", "2", sys.executable, "-m", "mpi4py"],
    }[launcher]
    env = env | {"SYNCBN_CHECK": check, "SYNCBN_MPI_TIMEOUT": str(TIMEOUT), "TEST_JOB": str(folder)}
    job = subprocess.Popen([*command, str(script), str(folder)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return job.wait(LIMIT), left_behind(str(folder))
    finally:
        kill(str(folder))


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_rank_1_ends_rank_0_with_an_error(launcher, name, tmp_path, subprocess_env):
    fault, words = FAULTS[name]
    mismatch = "RankMismatchError" in words
    status, left = launch(launcher, fault, tmp_path, subprocess_env, "always" if mismatch else "first")
    assert status != 0
    assert {path.name for path in tmp_path.glob("[01]")} == {"0", "1"}, "a rank has not made its first step"
    assert not left
    error = tmp_path / "0.error"
    if launcher == "mpirun" and name in ("raises before its collective", "is killed"):
        return  # MPI's launcher ends the others at once: they have no time to say anything
    if name in ("is killed", "raises before its collective") and not error.exists():
        return  # torchrun may end rank 0 before the error of its connection has reached it
    said = error.read_text()
    for word in words:
        assert word in said, said
    waited = float(re.search(r"after ([\d.]+) s", said).group(1))
    assert waited < TIMEOUT + 4, said
    if mismatch:
        assert "RankMismatchError" in (tmp_path / "1.error").read_text()


@pytest.mark.parametrize("name, launcher", [(name, launcher) for name, (launchers, _) in FAILURES.items() for launcher in launchers])
def test_a_collective_that_fails_on_rank_1_ends_both_ranks_with_an_error(name, launcher, tmp_path, subprocess_env):
    status, left = launch(launcher, f"{FAILURES[name][1]}; step(a, b)", tmp_path, subprocess_env, "first", 2 * TIMEOUT)
    assert status != 0
    assert not left
    for rank in range(2):
        said = (tmp_path / f"{rank}.error").read_text()
        for word in ["RuntimeError", "encoder.a", "forward", f"rank {rank} of 2"]:
            assert word in said, said
        assert float(re.search(r"after ([\d.]+) s", said).group(1)) < TIMEOUT + 4, said
