"""The environment variables that the package reads: its own, the launchers', and those of its build and tests.

This module is the only one that reads `os.environ`. The package's own variables are read and checked when the package is imported and
again by `init_process_group`, before any collective; the launchers' variables, when a process group is made.

    settings             what SYNCBN_* say; as `environment.settings`, since `reload` replaces it
    place()              this process's rank among the others, as its launcher describes it
    markdown()           the tables of docs/environment.md
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# ---- The package's own variables ---------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The values of the package's own variables."""

    native: bool
    cpu_isa: str
    check: str
    debug: bool
    mpi_timeout: float
    mpi_cuda_aware: bool
    shared_memory: bool


class Variable(NamedTuple):
    """One of the package's own variables. `parse` raises ValueError for a text that is not allowed."""

    field: str  # of Settings
    default: str
    allowed: str
    parse: Callable[[str], Any]
    meaning: str

    @property
    def name(self) -> str:
        return f"SYNCBN_{self.field.upper()}"

    def read(self, env: Mapping[str, str]) -> Any:
        text = env.get(self.name, "") or self.default
        try:
            return self.parse(text)
        except ValueError:
            raise ValueError(f"environment variable {self.name} is {text!r}: it must be {self.allowed}") from None


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return parse


def _switch(text: str) -> bool:
    return _one_of("0", "1")(text) == "1"


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:  # true for nan, too, with which a wait would never end
        raise ValueError
    return seconds


VARIABLES = (
    Variable("native", "1", "0 or 1", _switch, "0: plain torch instead of the compiled kernels"),
    Variable(
        "cpu_isa", "", "avx512, avx2 or baseline", _one_of("", "avx512", "avx2", "baseline"),
        "the widest instruction set that the CPU kernels use; the widest that the processor has, if not set",
    ),
    Variable(
        "check", "first", "first, always or off", _one_of("first", "always", "off"),
        "when the ranks compare what they are about to exchange: a layer's first exchange in each direction, every exchange, or none;"
        " the same on all ranks",
    ),
    Variable("debug", "0", "0 or 1", _switch, "1: log every exchange of an eager layer, at the price of waiting for it"),
    Variable("mpi_timeout", "1800", "a positive number of seconds", _seconds, "how long a rank waits for the others over MPI, in seconds"),
    Variable("mpi_cuda_aware", "0", "0 or 1", _switch, "1: hand CUDA tensors to MPI directly, instead of a copy in host memory"),
    Variable("shared_memory", "1", "0 or 1", _switch, "0: the ranks of a host exchange over their group, not in memory that they share"),
)  # fmt: skip


def read_settings(env: Mapping[str, str]) -> Settings:
    """The settings that `env` holds. Raises ValueError that names the variable, its value and what is allowed."""
    return Settings(**{variable.field: variable.read(env) for variable in VARIABLES})


settings = read_settings(os.environ)


def reload(env: Mapping[str, str] | None = None) -> None:
    """Reads the package's variables again, from the environment unless `env` is given. The settings stay if one is not allowed."""
    global settings
    settings = read_settings(os.environ if env is None else env)


# ---- The launchers' variables ------------------------------------------------------------------------------------------------


class Launcher(NamedTuple):
    """The variables of a launcher, for each value the names that it may have."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        return self[1:]


# The first is what torch's own init reads. It has precedence: torchrun, or a script that starts processes, may run inside any other.
LAUNCHERS = (
    Launcher("torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    Launcher(
        "Open MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "MVAPICH2", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher("jsrun", ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_LOCAL_RANK",), ("JSM_NAMESPACE_LOCAL_SIZE",)),
    Launcher("PALS", ("PALS_RANKID",), ("PALS_SIZE", "PMI_SIZE"), ("PALS_LOCAL_RANKID",), ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE")),
    Launcher("MPICH", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
    Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",), ("SLURM_STEP_TASKS_PER_NODE",)),
    Launcher("Flux", ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    Launcher("PMIx", ("PMIX_RANK",), ("WORLD_SIZE",)),  # names no size: the user has to
)  # fmt: skip
STARTED_BY = {
    "torchrun": "torchrun, DeepSpeed, PyTorchJob, Ray Train, scripts that call `mp.spawn`",
    "MPICH": "MPICH, Intel MPI",
    "PALS": "Cray PALS",
    "jsrun": "LSF's jsrun",
    "PMIx": "PMIx (`prun`)",
}
# What identifies a job to all of its processes, to find a port that another job is not likely to take.
JOB_IDS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")


@dataclass(frozen=True)
class Place:
    """A process's place among the others: `rank` of `world_size` in all, `local_rank` of `local_world_size` on its host.

    The local values are None if the launcher does not name them.
    """

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    local_world_size: int | None = 1


def place(env: Mapping[str, str] | None = None) -> Place:
    """This process's place according to `env`; a single process if no launcher has set its variables.

    Raises ValueError if a variable is not a number, or if a rank has no world size or the reverse.
    """
    env = os.environ if env is None else env
    found = [(launcher, [_first_set(env, names) for names in launcher.columns]) for launcher in LAUNCHERS]
    usable = [(launcher, names) for launcher, names in found if names[0] and names[1]]
    if not usable:
        _check_nothing_is_missing(found)
        return Place()
    complete = [row for row in usable if all(row[1])]
    launcher, names = usable[0] if usable[0][0] is LAUNCHERS[0] or not complete else complete[0]
    rank, world_size = _number(env, names[0]), _number(env, names[1])
    if rank is None or world_size is None or rank >= world_size:
        raise ValueError(f"environment variable {names[0]} is {rank}: it must be less than {names[1]}, which is {world_size}")
    return Place(launcher.name, rank, world_size, _number(env, names[2]), _local_world_size(env, launcher, names[3]))


def _first_set(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first name that `env` has; an empty text is as good as none, as in torch."""
    return next((name for name in names if env.get(name)), None)


def _check_nothing_is_missing(found: list[tuple[Launcher, list[str | None]]]) -> None:
    for launcher, names in found:
        one = names[0] or names[1]
        # A batch script has a SLURM_PROCID, too, before srun starts any task.
        if one and launcher.name != "srun":
            missing = " or ".join(launcher.world_size if names[0] else launcher.rank)
            raise ValueError(f"environment variable {one} is set, but {missing} is not: a process group needs both a rank and a world size")


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


# ---- Further variables, and the tables of all --------------------------------------------------------------------------------

MEETING = {
    "MASTER_ADDR": "the host of rank 0, where the ranks meet; found from srun's variables or over MPI if not set",
    "MASTER_PORT": "a free port there",
    "TORCHELASTIC_RESTART_COUNT": "how often torchrun has restarted the ranks",
    "GROUP_WORLD_SIZE": "torchrun's number of hosts",
    "SLURM_NODEID": "the host's number in the list of tasks per node",
    "SLURM_STEP_NODELIST": "srun's hosts, of which the first is rank 0's",
    "SLURM_GPUS_PER_TASK": "whether each task has GPUs of its own",
    "SLURM_TRES_PER_TASK": "the same, as newer versions of SLURM write it",
    **dict.fromkeys(JOB_IDS, "identifies the job, to choose a port"),
    "OMP_NUM_THREADS": "whether `python -m syncbn.check` reports that each rank uses all cores",
}
DEVICES = {
    "CUDA_VISIBLE_DEVICES": "whether the compiled kernels run on each GPU that this process can use",
    "CUDA_DEVICE_ORDER": "whether a number in CUDA_VISIBLE_DEVICES is known to mean one GPU, if they differ: only with PCI_BUS_ID",
}
BUILD = {
    "SYNCBN_BUILD_CPU": "0: leave the CPU kernels out; 1: fail if they cannot be built; not set: build them if there is a C++ compiler",
    "SYNCBN_BUILD_CUDA": "the same for the CUDA kernels and nvcc",
    "TORCH_CUDA_ARCH_LIST": 'the GPUs to compile for, such as "8.0;9.0+PTX"; if not set, all from 7.5 on that nvcc supports',
    "SYNCBN_PLANS": "a header with other Plans than csrc/cuda/plans.cuh, to measure or test them",
    "CXX": "the C++ compiler",
    "NVCC": "the CUDA compiler",
    "MAX_JOBS": "how many compilers run at once; one per core if not set",
}
TESTS = {
    "SYNCBN_TEST_TIMEOUT": "seconds after which a rank that waits for another one fails; 60 if not set",
    "SYNCBN_TEST_BACKEND": "torch.distributed's backend; gloo if not set",
    "SYNCBN_TEST_DEVICE": "the device of tensors that a test does not place itself, such as cuda",
    "SYNCBN_TEST_JOB": "marks the processes of a job that a test has started; set by the tests",
    "SYNCBN_FUZZ": "seconds of random layers; 9 if not set",
}


def get(name: str) -> str | None:
    """A variable of MEETING or DEVICES; None if it is not set."""
    assert name in MEETING or name in DEVICES, name
    return os.environ.get(name) or None


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES; the empty text, which leaves no GPU, is another value than None, which leaves all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def export(values: Mapping[str, object]) -> None:
    """Sets variables for other programs that read them."""
    os.environ.update({name: str(value) for name, value in values.items()})


def markdown() -> str:
    """The tables of docs/environment.md: python -c 'from syncbn import environment; print(environment.markdown())'"""
    own = [(v.name, v.allowed, v.default or "not set", v.meaning) for v in VARIABLES]
    launchers = [(STARTED_BY.get(row.name, row.name), *(" or ".join(names) for names in row.columns)) for row in LAUNCHERS]
    return "\n".join(
        [
            *_table("## Read when syncbn is imported", ("variable", "allowed", "default", "meaning"), own),
            *_table("## A process's place", ("started by", "rank", "world size", "local rank", "ranks on its host"), launchers),
            *_table("## Where the ranks meet", ("variable", "meaning"), MEETING.items()),
            *_table("## Which GPUs a process can use", ("variable", "meaning"), DEVICES.items()),
            *_table("## Read when syncbn is built", ("variable", "meaning"), BUILD.items()),
            *_table("## Read by the tests", ("variable", "meaning"), TESTS.items()),
        ]
    )


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [title, "", *("| " + " | ".join(cells) + " |" for cells in lines), ""]
