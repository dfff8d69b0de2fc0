"""The place of this process among the others, from what torchrun, mpirun or srun has set, and the process group made of it."""

from __future__ import annotations

import atexit
import datetime
import itertools
import os
import re
import socket
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

# launcher -> its variables for rank, world size, local rank, local world size. torchrun first: it may run inside the others.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # and Intel MPI
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
_made = itertools.count()  # process groups of this process
# What identifies a job to all of its processes, to find a port that another job is not likely to take.
_JOB_IDS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")


@dataclass(frozen=True)
class Place:
    """Where a process stands: `rank` of `world_size` in all, `local_rank` of `local_world_size` on its host."""

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place according to `env`; alone where no launcher has left its variables.

    Raises ValueError where a launcher has set only some of them.
    """
    incomplete = []
    for launcher, names in _LAUNCHERS.items():
        found = [name for name in names if name in env]
        if names[0] not in found or names[1] not in found:
            continue
        if len(found) < len(names):
            missing = sorted(set(names) - set(found))
            incomplete.append(f"{', '.join(found)} are set, as by {launcher}, but not {', '.join(missing)}")
            continue
        rank, world_size, local_rank = (int(env[name]) for name in names[:3])
        node = int(env.get("SLURM_NODEID", 0)) if launcher == "srun" else 0
        return Place(launcher, rank, world_size, local_rank, _tasks_per_node(env[names[3]])[node])
    if incomplete:
        raise ValueError(f"cannot tell this process's device: {'; '.join(incomplete)}")
    return Place()


def init_process_group(backend: str | None = None, timeout: datetime.timedelta | float | None = None) -> torch.device:
    """Starts torch.distributed under torchrun, mpirun (Open MPI, MPICH, Intel MPI), srun, or alone, and returns this rank's device.

    Args:
        backend: "nccl", "gloo" or another of torch's. None takes NCCL where each rank of the host has a GPU of its own, else gloo.
        timeout: after which a collective that some rank does not join fails; seconds or a timedelta. None is torch's default.

    Returns:
        cuda:<local rank>, set as the current device, where there are GPUs; else cpu.

    Raises:
        ValueError: the launcher's variables are incomplete, or mpi4py belongs to another MPI than mpirun.

    Also sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which other tools read.

    >>> device = init_process_group()
    >>> torch.distributed.get_world_size()
    1
    >>> torch.distributed.destroy_process_group()
    """
    here = export()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", here.local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if backend is None:
        # One visible GPU may be this rank's own, set apart by the launcher, or be shared; several that are too few are shared.
        own = gpus >= here.local_world_size or (gpus == 1 and _sees_a_gpu_of_its_own())
        backend = "nccl" if own else "gloo"
        if gpus and backend == "gloo":
            warnings.warn(
                f"{here.local_world_size} ranks share {gpus} GPUs, which NCCL refuses: using gloo, which is slow."
                " If each has a GPU of its own, pass backend='nccl'",
                stacklevel=2,
            )
    if isinstance(timeout, (int, float)):
        timeout = datetime.timedelta(seconds=timeout)
    if here.launcher is None:  # alone: no address and no port that could be taken
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout or dist.default_pg_timeout))
        # A store outlives a group that is destroyed, and torchrun's the ranks that it starts anew (pytorch issue 135712): under keys of
        # their own, ranks do not read the addresses of those before them and call them in vain.
        store = dist.PrefixStore(f"restart {_restarts()}, group {next(_made)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if "gloo" in backend:
        # A thread of gloo may still hold the last collective's tensor. If it lets go while Python shuts down, torch aborts the process
        # ("terminate called without an active exception"): seen once in 8 runs of a script, and in none of 30 with this pause.
        atexit.register(time.sleep, 0.05)
    return device


def _restarts() -> str:
    """How often torchrun has started the ranks of this job anew. Agents on several hosts count for themselves: see launch/torchrun.sh."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"


def _sees_a_gpu_of_its_own() -> bool:
    """Whether srun was told to give each task its GPUs."""
    # The second is set for processors, too: "cpu=8,gres/gpu=1".
    return "SLURM_GPUS_PER_TASK" in os.environ or "gres/gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")


def export() -> Place:
    """Sets the variables that torchrun would have set, and returns this process's place."""
    here = place()
    if here.launcher in (None, "torchrun"):
        return here
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        host, port = _meeting_point(here)
        os.environ.setdefault("MASTER_ADDR", host)
        os.environ.setdefault("MASTER_PORT", str(port))
    names = _LAUNCHERS["torchrun"]
    os.environ.update(zip(names, map(str, (here.rank, here.world_size, here.local_rank, here.local_world_size)), strict=True))
    return here


def _meeting_point(here: Place) -> tuple[str, int]:
    """The host of rank 0 and a free port there."""
    if here.launcher == "srun":
        return _first_host(os.environ["SLURM_STEP_NODELIST"]), _port_of_job()
    try:
        from mpi4py import MPI
    except ImportError:
        # MPICH does not name its jobs: two of them on a host would take one port.
        if here.local_world_size < here.world_size or not any(name in os.environ for name in _JOB_IDS):
            raise ValueError(
                "MPICH's mpirun, and any over several hosts, needs mpi4py (pip install 'syncbn[mpi]'), or MASTER_ADDR and MASTER_PORT"
            ) from None
        return "127.0.0.1", _port_of_job()
    if MPI.COMM_WORLD.Get_size() != here.world_size:
        raise ValueError(
            f"mpirun has started {here.world_size} ranks, but mpi4py ({MPI.Get_library_version().split(',')[0].split(chr(10))[0]})"
            f" sees {MPI.COMM_WORLD.Get_size()}: it was built for another MPI"
        )
    message = bytearray(256)
    if here.rank == 0:
        with socket.socket() as s:
            s.bind(("", 0))
            text = f"{socket.gethostname() if here.local_world_size < here.world_size else '127.0.0.1'} {s.getsockname()[1]}"
        message[: len(text)] = text.encode()
    MPI.COMM_WORLD.Bcast(message)
    host, port = message.rstrip(b"\0").decode().split()
    return host, int(port)


def _port_of_job() -> int:
    """A port from 20000 to 29999 that all processes of a job compute alike."""
    job = "".join(os.environ.get(name, "") for name in _JOB_IDS)
    return 20000 + zlib.crc32(job.encode()) % 10000


def _first_host(nodes: str) -> str:
    """gpu[03-07,12],cpu1 -> gpu03"""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert match, nodes
    return "".join(part or "" for part in match.groups())


def _tasks_per_node(counts: str) -> list[int]:
    """4(x2),3 -> [4, 4, 3]; a plain number is the count on every node that matters, this one."""
    tasks = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks
