"""Starts torch.distributed from the launcher's variables: where the ranks meet, and which GPU belongs to this rank."""

from __future__ import annotations

import atexit
import datetime
import functools
import re
import socket
import time
import warnings
import zlib
from dataclasses import replace

import torch
import torch.distributed as dist

from .. import environment
from ..environment import RankInfo, rank_info


def init_process_group(backend: str | None = None, timeout: datetime.timedelta | float | None = None) -> torch.device:
    """Starts torch.distributed from the launcher's variables, or for a single process, and returns this rank's device.

    It works under torchrun, mpirun (Open MPI, MPICH, Intel MPI, MVAPICH2), srun, jsrun, PALS and Flux, and under any launcher that sets
    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        backend: "nccl", "gloo" or another of torch's. None means NCCL if each rank has a GPU of its own, else gloo.
        timeout: how long a collective waits for a missing rank before it fails, in seconds or as a timedelta. None is torch's default.

    Returns:
        if this process sees n GPUs, cuda:<local rank modulo n>, which it makes the current device; without GPUs, cpu.

    Raises:
        ValueError: an environment variable is missing or has a value that is not allowed, mpi4py belongs to another MPI than mpirun,
            or torch.distributed has been initialized with another backend.
        RuntimeError: the ranks did not meet within the timeout, or rank 0 cannot listen on MASTER_PORT.

    If torch.distributed is initialized already, this only checks the backend and the package's variables, and returns the current device.
    Under a launcher that does not set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, this function does, for
    other tools.

    >>> device = init_process_group()
    >>> torch.distributed.get_world_size()
    1
    >>> torch.distributed.destroy_process_group()
    """
    environment.reload()
    if isinstance(timeout, (int, float)):
        timeout = datetime.timedelta(seconds=timeout)
    if dist.is_initialized():
        _check_backend(backend)
        return torch.device("cuda", torch.cuda.current_device()) if _gpus() else torch.device("cpu")
    here = export()
    if here.world_size == 1 and environment.get("MASTER_ADDR") is None:  # this store needs no address, and no port, which might be in use
        store: dist.Store = dist.HashStore()
    else:
        store = _store_of_this_group(here, timeout or dist.default_pg_timeout)
        here = _with_local_rank(here, store)
    device = _device(here)
    backend = _common_backend(backend, here, store)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=timeout)
    if "gloo" in backend:
        _pause_at_exit()
    return device


def export() -> RankInfo:
    """Sets the variables that torchrun would have set, as far as the launcher gives their values. Returns this process's `RankInfo`."""
    here = rank_info()
    if here.launcher in (None, "torchrun"):
        return here
    if environment.get("MASTER_ADDR") is None or environment.get("MASTER_PORT") is None:
        host, port = _meeting_point(here)
        environment.export({"MASTER_ADDR": environment.get("MASTER_ADDR") or host, "MASTER_PORT": environment.get("MASTER_PORT") or port})
    _export_rank_info(here)
    return here


def _export_rank_info(here: RankInfo) -> None:
    values = {"RANK": here.rank, "WORLD_SIZE": here.world_size, "LOCAL_RANK": here.local_rank, "LOCAL_WORLD_SIZE": here.local_world_size}
    environment.export({name: value for name, value in values.items() if value is not None})


# ---- The device and the backend ----------------------------------------------------------------------------------------------


def _check_backend(backend: str | None) -> None:
    """Raises ValueError if torch.distributed has been initialized with another backend."""
    running = dist.get_backend_config()
    if backend is not None and str(dist.BackendConfig(dist.Backend(backend))) != running:
        raise ValueError(f"torch.distributed has been initialized with {running}: destroy that process group first, to use {backend!r}")


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device(here: RankInfo) -> torch.device:
    """This rank's device, which becomes the current one."""
    gpus = _gpus()
    if not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", (here.local_rank or 0) % gpus)
    torch.cuda.set_device(device)
    return device


def has_a_gpu_of_its_own(here: RankInfo) -> bool:
    """Whether this rank has a GPU that no other rank of its host uses, as far as a rank can tell.

    If it sees fewer GPUs than there are ranks on its host, it takes them to be shared, unless the launcher says otherwise."""
    gpus = _gpus()
    return gpus >= (here.local_world_size or 1) or (gpus > 0 and _sees_gpus_of_its_own())


def _default_backend(here: RankInfo) -> str:
    """NCCL if each rank of this host has a GPU of its own; else gloo, with a warning if there are GPUs."""
    private = has_a_gpu_of_its_own(here)
    if _gpus() and not private:
        warnings.warn(
            f"{here.local_world_size} ranks share {_gpus()} GPUs, which NCCL refuses: using gloo, which is slow."
            " If each has a GPU of its own, pass backend='nccl'",
            stacklevel=4,
        )
    return "nccl" if private else "gloo"


def _common_backend(backend: str | None, here: RankInfo, store: dist.Store) -> str:
    """`backend`; if it is None, the default of this host, or gloo with a warning if that is another host's. Every rank calls it."""
    choice = backend or _default_backend(here)
    store.set(f"backend of rank {here.rank}", choice)
    if backend is not None or choice == "gloo":
        return choice
    choices = [bytes(other) for other in store.multi_get([f"backend of rank {rank}" for rank in range(here.world_size)])]
    if b"gloo" not in choices:
        return choice
    warnings.warn(f"rank {choices.index(b'gloo')} uses gloo, so this one does, too, although it has a GPU of its own", stacklevel=3)
    return "gloo"


def _sees_gpus_of_its_own() -> bool:
    """Whether srun was told to give each task GPUs of its own."""
    # SLURM_TRES_PER_TASK is also set for CPU requests: "cpu=8,gres/gpu=1".
    return environment.get("SLURM_GPUS_PER_TASK") is not None or "gres/gpu" in (environment.get("SLURM_TRES_PER_TASK") or "")


# ---- The store through which the ranks find each other -----------------------------------------------------------------------


def _store_of_this_group(here: RankInfo, timeout: datetime.timedelta) -> dist.Store:
    """A store in which no earlier process group has left its addresses.

    A store outlives its process group, and torchrun's store outlives restarted ranks, so ranks would read the addresses of their
    predecessors (pytorch issue 135712). Therefore rank 0 opens a generation, and any other rank takes part in the latest generation,
    or in the next one if this rank's place there is taken, by this process or by one before it. So a process that replaces a dead
    one meets the survivors in the next generation.
    """
    _check_address()
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        while True:
            left = datetime.timedelta(seconds=max(deadline - time.monotonic(), 1))
            try:
                store, *_ = next(dist.rendezvous("env://", rank=here.rank, world_size=here.world_size, timeout=left))
                return _generation(dist.PrefixStore(f"restart {_restarts()}", store), here.rank, left)
            except dist.DistNetworkError:  # perhaps this was an earlier group's store, which rank 0 has closed: it opens another
                if here.rank == 0 or deadline - time.monotonic() < 1:
                    raise
                time.sleep(0.1)
    except dist.DistError as error:
        address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')} (timeout {timeout.total_seconds():g} s)"
        missing, cannot = ("rank 0", "be reached") if here.rank else ("another rank", "be used by this one")
        raise RuntimeError(
            f"{error}\nrank {here.rank} of {here.world_size} could not meet the others at {address}:"
            f" {missing} has not started or has failed, or the address cannot {cannot}"
        ) from error


def _generation(store: dist.Store, rank: int, timeout: datetime.timedelta) -> dist.Store:
    generation = store.add("generations", 1 if rank == 0 else 0)
    while generation == 0 or store.add(f"generation {generation}, rank {rank}", 1) > 1:
        generation += 1
        store.wait([f"generation {generation}"], timeout)
    if rank == 0:
        store.set(f"generation {generation}", "open")
    return dist.PrefixStore(f"generation {generation}", store)


def _check_address() -> None:
    """Raises ValueError unless MASTER_ADDR and MASTER_PORT say where the ranks meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if environment.get(name) is None:
            raise ValueError(f"environment variable {name} is not set: set MASTER_ADDR and MASTER_PORT to where rank 0 listens")
    port = environment.get("MASTER_PORT") or ""
    if not (port.isdecimal() and int(port) < 65536):
        raise ValueError(f"environment variable MASTER_PORT is {port!r}: it must be a port, 0 to 65535")


def _with_local_rank(here: RankInfo, store: dist.Store) -> RankInfo:
    """`here` with its local values, computed from the names of the ranks' hosts if the launcher has not set them.

    Every rank calls it, because another rank without local values needs this one's host name.
    """
    store.set(f"host of rank {here.rank}", socket.gethostname())
    if here.local_rank is not None and here.local_world_size is not None:
        return here
    hosts = [bytes(host) for host in store.multi_get([f"host of rank {rank}" for rank in range(here.world_size)])]
    earlier, host = hosts[: here.rank], hosts[here.rank]
    local_rank = earlier.count(host) if here.local_rank is None else here.local_rank
    here = replace(here, local_rank=local_rank, local_world_size=here.local_world_size or hosts.count(host))
    _export_rank_info(here)
    return here


def _restarts() -> str:
    """The job's restart count, or 0 on several hosts, because their agents count independently; there each restart needs a store
    of its own, as launch/torchrun.sh provides."""
    counts = environment.get("TORCHELASTIC_RESTART_COUNT") if environment.get("GROUP_WORLD_SIZE") == "1" else None
    return counts or "0"


@functools.cache  # one pause per process
def _pause_at_exit() -> None:
    # A thread of gloo may still hold the last collective's tensor. If it releases the tensor during interpreter shutdown, torch aborts
    # the process ("terminate called without an active exception"): seen once in 8 runs of a script, and in none of 30 with this pause.
    atexit.register(time.sleep, 0.05)


# ---- Where the ranks meet ----------------------------------------------------------------------------------------------------


def _meeting_point(here: RankInfo) -> tuple[str, int]:
    """The host of rank 0 and a port there: a free one if rank 0 chooses it, else one that all ranks compute."""
    if here.world_size == 1:  # there is no other rank to meet, so no launcher has to say where
        return "127.0.0.1", _free_port()
    hosts = environment.get("SLURM_STEP_NODELIST")
    if here.launcher == "srun" and hosts:
        return _first_host(hosts), _port_of_job()
    try:
        from mpi4py import MPI
    except ImportError:
        # MPICH does not identify its jobs, so two of them on a host would choose the same port.
        if here.local_world_size != here.world_size or not _job():
            raise ValueError(
                f"{here.launcher} does not say where the ranks meet: install mpi4py (pip install 'syncbn[mpi]'),"
                " or set MASTER_ADDR and MASTER_PORT"
            ) from None
        return "127.0.0.1", _port_of_job()
    if MPI.COMM_WORLD.Get_size() != here.world_size:
        library = MPI.Get_library_version().splitlines()[0].split(",")[0]
        raise ValueError(
            f"{here.launcher} has started {here.world_size} ranks, but mpi4py ({library}) sees {MPI.COMM_WORLD.Get_size()}:"
            " it was built for another MPI"
        )
    message = bytearray(256)
    if here.rank == 0:
        host = "127.0.0.1" if here.local_world_size == here.world_size else socket.gethostname()
        text = f"{host} {_free_port()}"
        message[: len(text)] = text.encode()
    MPI.COMM_WORLD.Bcast(message)
    host, port = message.rstrip(b"\0").decode().split()
    return host, int(port)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _job() -> str:
    return "".join(environment.get(name) or "" for name in environment.JOB_IDS)


def _port_of_job() -> int:
    """A port from 20000 to 29999 that all processes of a job compute alike."""
    return 20000 + zlib.crc32(_job().encode()) % 10000


def _first_host(nodes: str) -> str:
    """gpu[03-07,12],cpu1 -> gpu03; rack[1-2]node[3-4] -> rack1node3"""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # up to a comma that is in no brackets
    assert first, nodes
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
