"""The variables by which a launcher tells a process its rank. To add a launcher: docs/architecture.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Launcher(NamedTuple):
    """For each value that a launcher provides, the variables that may hold it."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        return self[1:]


# torchrun's row, with the RANK and WORLD_SIZE that torch's own init reads, is first: another launcher may start torchrun, or a script that
# sets these. PALS and Flux come before MPICH, because they set PMI_RANK and PMI_SIZE, too.
LAUNCHERS = (
    Launcher("torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    Launcher(
        "Open MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "MVAPICH2", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher("jsrun", ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_LOCAL_RANK",), ("JSM_NAMESPACE_LOCAL_SIZE",)),
    Launcher(
        "PALS", ("PALS_RANKID",), ("PALS_SIZE", "PMI_SIZE", "WORLD_SIZE"), ("PALS_LOCAL_RANKID",), ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    ),
    Launcher("Flux", ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    Launcher("MPICH", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
    Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",), ("SLURM_STEP_TASKS_PER_NODE",)),
    Launcher("PMIx", ("PMIX_RANK",), ("WORLD_SIZE",)),  # sets no size, so the user has to
)  # fmt: skip
STARTED_BY = {
    "torchrun": "torchrun, DeepSpeed, PyTorchJob, Ray Train, scripts that call `mp.spawn`",
    "MPICH": "MPICH, Intel MPI",
    "PALS": "Cray PALS",
    "jsrun": "LSF's jsrun",
    "PMIx": "PMIx (`prun`)",
}
# These identify a job to all of its processes, so that they can agree on a port that another job is unlikely to take.
JOB_IDS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PALS_APID")


@dataclass(frozen=True)
class RankInfo:
    """A process is `rank` of `world_size` in all, and `local_rank` of `local_world_size` on its host.

    The local values are None if the launcher does not provide them.
    """

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    local_world_size: int | None = 1


def read_rank_info(env: Mapping[str, str]) -> RankInfo:
    """The rank and world size by a launcher's variables in `env`; a single process if no launcher has set its variables.

    Raises:
        ValueError: a variable is not a number, a rank is set without a world size or the reverse (except srun's), or a rank is not below
            its world size.
    """
    rows = [(launcher, [_first_set(env, names) for names in launcher.columns]) for launcher in LAUNCHERS]
    usable = [(launcher, names) for launcher, names in rows if names[0] and names[1]]
    if not usable:
        _check_nothing_is_missing(rows)
        return RankInfo()
    complete = [row for row in usable if all(row[1])]
    launcher, names = usable[0] if usable[0][0] is LAUNCHERS[0] or not complete else complete[0]
    rank, world_size = _number(env, names[0]), _number(env, names[1])
    if rank is None or world_size is None or rank >= world_size:
        raise ValueError(f"environment variable {names[0]} is {rank}: it must be less than {names[1]}, which is {world_size}")
    return RankInfo(launcher.name, rank, world_size, _number(env, names[2]), _local_world_size(env, launcher, names[3]))


def _first_set(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of `names` that is set. An empty text counts as not set, as in torch."""
    return next((name for name in names if env.get(name)), None)


def _check_nothing_is_missing(rows: list[tuple[Launcher, list[str | None]]]) -> None:
    for launcher, names in rows:
        present = names[0] or names[1]
        # SLURM sets SLURM_PROCID in a batch script, too, but no SLURM_STEP_NUM_TASKS: srun has not started any task.
        if present and launcher.name != "srun":
            missing = " or ".join(launcher.world_size if names[0] else launcher.rank)
            raise ValueError(
                f"environment variable {present} is set, but {missing} is not: a process group needs both a rank and a world size"
            )


def _number(env: Mapping[str, str], name: str | None) -> int | None:
    if name is None:
        return None
    text = env[name]
    if not text.isdecimal():
        raise ValueError(f"environment variable {name} is {text!r}: it must be a whole number, 0 or greater")
    return int(text)


def _local_world_size(env: Mapping[str, str], launcher: Launcher, name: str | None) -> int | None:
    if name is None or launcher.name != "srun":
        return _number(env, name)
    counts = tasks_per_node(name, env[name])
    node = _number(env, "SLURM_NODEID") if env.get("SLURM_NODEID") else 0
    if len(counts) == 1:
        return counts[0]
    if node is None or node >= len(counts):
        raise ValueError(f"environment variable SLURM_NODEID is {node}, but {name} is {env[name]!r}, which has {len(counts)} nodes")
    return counts[node]


def tasks_per_node(name: str, counts: str) -> list[int]:
    """4(x2),3 -> [4, 4, 3]"""
    tasks = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        if not (count.isdecimal() and (times or "1").isdecimal()):
            raise ValueError(f"environment variable {name} is {counts!r}: it must be a list of counts such as 4(x2),3")
        tasks += [int(count)] * int(times or 1)
    return tasks
