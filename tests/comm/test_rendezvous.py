"""The process group that is made of a launcher's variables: where its ranks meet, in which store, and on which device each works."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

import syncbn
from support.forks import ForkServer
from support.processes import LAUNCHERS_NAMES, outputs, run, torchrun, two_ranks
from support.srun import SRUN
from syncbn import environment
from syncbn.comm import rendezvous

NAMES = LAUNCHERS_NAMES | {"MASTER_ADDR", "MASTER_PORT"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-07,12],cpu1", "gpu03"),
        ("a1,b2", "a1"),
        ("n[1,5]-ib", "n1-ib"),
        ("rack-2-node[10-11]", "rack-2-node10"),
        ("rack[1-2]node[3-4],spare[1-2]", "rack1node3"),
        ("rack[0-1,7],node[3-4]", "rack0"),
    ],
)
def test_the_first_host_of_a_slurm_list_is_found(nodes, first):
    assert rendezvous._first_host(nodes) == first


def test_export_gives_srun_tasks_one_meeting_point(monkeypatch):
    seen = set()
    for rank in ("0", "5"):
        with monkeypatch.context() as m:
            for name in NAMES:
                m.setenv(name, "restored afterwards")
                m.delenv(name)
            for name, value in (SRUN | {"SLURM_PROCID": rank}).items():
                m.setenv(name, value)
            rendezvous.export()
            assert os.environ["RANK"] == rank and os.environ["LOCAL_WORLD_SIZE"] == "4"
            seen.add((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]))
    assert len(seen) == 1 and seen.pop()[0] == "gpu03"


@pytest.mark.world_size(1)
def test_a_single_rank_needs_no_mpi4py_to_meet_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    host, port = rendezvous._meeting_point(environment.RankInfo("MPICH", 0, 1, 0, 1))
    assert host == "127.0.0.1" and port > 0
    with pytest.raises(ValueError, match="install mpi4py"):
        rendezvous._meeting_point(environment.RankInfo("MPICH", 0, 2, 0, 2))


JOB = """
import os, sys, torch, torch.distributed as dist, syncbn
device = syncbn.init_process_group(timeout=30)
assert syncbn.init_process_group() == device  # as in a notebook whose cell runs twice
x = torch.ones(1, device=device)
dist.all_reduce(x)
open(f"{sys.argv[1]}/{dist.get_rank()}", "w").write(f"sum {int(x)} of {dist.get_world_size()} on {device}, {os.environ.get('LOCAL_RANK')}")
try:
    syncbn.init_process_group("mpi")
    sys.exit("no error: a backend that is not the running one")
except ValueError as error:
    assert "has been initialized with" in str(error)
"""


@pytest.mark.world_size(1)
@pytest.mark.parametrize("launcher", ["none", "torchrun", "mpirun"])
def test_init_process_group_makes_the_default_group_under_each_launcher(launcher, tmp_path, subprocess_env):
    (tmp_path / "job.py").write_text(JOB)
    command = {
        "none": [sys.executable],
        "torchrun": torchrun(),
        "mpirun": ["mpirun", "-n", "2", sys.executable],
    }[launcher]
    done = run([*command, str(tmp_path / "job.py"), str(tmp_path)], env=subprocess_env, timeout=100)
    assert done.returncode == 0, done.stderr
    check_outputs(tmp_path, 1 if launcher == "none" else 2, launcher != "none")


def check_outputs(folder: Path, size: int, local_rank: bool) -> None:
    for rank in range(size):
        text = (folder / str(rank)).read_text()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert text.startswith(f"sum {size} of {size} on {device}")
        assert text.endswith(f", {rank if local_rank else None}")


@pytest.mark.world_size(1)
@pytest.mark.parametrize("missing", [("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE",)], ids=["PyTorchJob", "DeepSpeed"])
def test_the_local_rank_is_found_by_the_hosts(missing, tmp_path, forks, subprocess_env):
    ranks = [{name: value for name, value in rank.items() if name not in missing} for rank in two_ranks()]
    run_on_each(forks, JOB, tmp_path, subprocess_env, ranks)
    check_outputs(tmp_path, 2, True)


def run_on_each(forks: ForkServer, code: str, folder: Path, env: dict[str, str], ranks: list[dict[str, str]]) -> None:
    """A job that no launcher starts."""
    script = folder / "job.py"
    script.write_text(code)
    ended = forks.run(script, str(folder), env=env, timeout=100, ranks=ranks)
    assert all(rank.returncode == 0 for rank in ended), outputs(ended)


def test_a_missing_address_is_named(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(environment, "settings", environment.settings)
    for name, value, words in (
        ("WORLD_SIZE", "2", "WORLD_SIZE is set, but RANK is not"),
        ("RANK", "1", "MASTER_ADDR is not set"),
        ("MASTER_ADDR", "localhost", "MASTER_PORT is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http': it must be a port"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"environment variable {words}"):
            syncbn.init_process_group()


@pytest.mark.world_size(1)
@pytest.mark.parametrize(("rank", "cause"), [(0, "another rank has"), (1, "rank 0 has")])
def test_ranks_that_do_not_meet_suspect_another_rank(rank, cause, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(environment, "settings", environment.settings)
    with socket.socket() as s:
        s.bind(("", 0))  # and does not listen: rank 0 cannot use the port, and rank 1 gets no answer
        for name, value in (two_ranks()[rank] | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError, match=rf"rank {rank} of 2 could not meet the others at .* \(timeout 1 s\): {cause} not started"):
            syncbn.init_process_group("gloo", timeout=1)


NEWCOMER = """
import os, sys, torch, torch.distributed as dist, syncbn
fresh, rank = "FRESH" in os.environ, int(os.environ["RANK"])
if not fresh:
    syncbn.init_process_group("gloo", timeout=20)
    dist.barrier()  # or a rank might leave while the other still connects to it
    dist.destroy_process_group()
    if rank == 1:  # starts afresh, as a process that replaces this one
        os.environ["FRESH"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
syncbn.init_process_group("gloo", timeout=20)
x = torch.ones(1)
dist.all_reduce(x)
open(f"{sys.argv[1]}/{rank}", "w").write(f"{int(x)} {fresh}")
"""


@pytest.mark.world_size(1)
def test_a_process_that_replaces_a_dead_one_meets_the_survivors(tmp_path, forks, subprocess_env):
    run_on_each(forks, NEWCOMER, tmp_path, subprocess_env, two_ranks())
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 False", "2 True"]


@pytest.mark.world_size(1)
def test_the_pause_at_exit_is_made_once(monkeypatch):
    registered = []
    monkeypatch.setattr(rendezvous.atexit, "register", lambda *arguments: registered.append(arguments))
    rendezvous._pause_at_exit.cache_clear()
    for _ in range(3):
        syncbn.init_process_group("gloo")
        torch.distributed.destroy_process_group()
    assert len(registered) == 1


AGAIN = """
import gc, sys, torch, torch.distributed as dist, syncbn
from torch import nn
model = syncbn.convert_sync_batchnorm(nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)}))
a, b = model["a"], model["b"]
whole = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
for time in range(3):
    syncbn.init_process_group("gloo", timeout=20)
    rank = dist.get_rank()
    x = whole.split([5, 2])[rank]
    for group in (None, dist.new_group(), syncbn.new_group("node")):
        a.process_group = b.process_group = group
        try:
            (a if rank == 0 else b)(x)  # both were verified in the former groups
            sys.exit("no mismatch: what was verified in the groups before is taken for this one's")
        except syncbn.RankMismatchError:
            pass
        for layer in (a, b):
            want = nn.BatchNorm1d(3)(whole).split([5, 2])[rank]
            torch.testing.assert_close(layer(x), want)
    a.process_group = b.process_group = group = None
    with syncbn.join(a):
        for _ in range(rank + 1):
            a(x).sum().backward()
    dist.destroy_process_group()
    gc.collect()
    torch.testing.assert_close(a(x), nn.BatchNorm1d(3)(x))  # alone
open(f"{sys.argv[1]}/{rank}", "w").close()
"""


@pytest.mark.world_size(1)
def test_recreated_default_group_has_no_stale_state(tmp_path, forks, subprocess_env):
    """Nor have its subgroups and the groups of syncbn.join."""
    run_on_each(forks, AGAIN, tmp_path, subprocess_env, two_ranks())
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


HASTY = """
import sys, time, torch.distributed as dist, syncbn
for turn in range(2):
    syncbn.init_process_group("gloo", timeout=20)
    rank = dist.get_rank()
    dist.barrier()  # or a rank might leave while the other still connects to it
    if rank == turn == 0:
        time.sleep(1)
    dist.destroy_process_group()
open(f"{sys.argv[1]}/{rank}", "w").close()
"""


@pytest.mark.world_size(1)
def test_a_rank_may_begin_anew_before_the_others_have_ended(tmp_path, forks, subprocess_env):
    """It finds rank 0's old store, which then goes away."""
    run_on_each(forks, HASTY, tmp_path, subprocess_env, two_ranks())
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


@pytest.mark.process_group
@pytest.mark.world_size(2, 3, 4)
def test_new_group_is_this_ranks_part(world):
    import torch.distributed as dist

    node = syncbn.new_group("node")
    assert node.size() == world.size  # the test's ranks share a host
    alone = syncbn.new_group(1)
    assert alone.size() == 1
    if world.size == 4:
        pair = syncbn.new_group(2)
        t = torch.tensor([float(world.rank)])
        dist.all_reduce(t, group=pair)
        assert t.item() == (1 if world.rank < 2 else 5)
    for bad in ("rack", 0, -1, world.size + 1, 1.5):
        with pytest.raises(ValueError, match="ranks_per_group"):
            syncbn.new_group(bad)


@pytest.mark.world_size(1)
def test_new_group_without_torch_distributed_says_what_to_call():
    if torch.distributed.is_initialized():
        pytest.skip("this run has a process group")
    with pytest.raises(ValueError, match="init_process_group"):
        syncbn.new_group(1)
