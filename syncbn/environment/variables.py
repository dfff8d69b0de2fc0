"""The variables that the package, its build and its tests read, each with its meaning, as tables. SYNCBN_ANNOUNCED is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .launchers import JOB_IDS, LAUNCHERS, STARTED_BY

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
    peer: bool
    replace_torch: bool


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
        "when ranks that do not exchange in one host's memory compare whole signatures: at a layer's first exchange in each direction, or"
        " at every one; in both cases every eager exchange outside syncbn.join is also verified by a digest; off: neither; the same on all"
        " ranks",
    ),
    Variable("debug", "0", "0 or 1", _switch, "1: log every exchange of an eager layer, at the price of waiting for it"),
    Variable("mpi_timeout", "1800", "a positive number of seconds", _seconds, "how long a rank waits for the others over MPI, in seconds"),
    Variable("mpi_cuda_aware", "0", "0 or 1", _switch, "1: hand CUDA tensors to MPI directly, instead of a copy in host memory"),
    Variable("shared_memory", "1", "0 or 1", _switch, "0: the ranks of a host exchange over their group, not in memory that they share"),
    Variable(
        "peer", "0", "0 or 1", _switch,
        "1: the ranks of a node exchange CUDA tensors in each other's GPU memory, not over their group; the same on all ranks; has not"
        " run on two GPUs yet",
    ),
    Variable(
        "replace_torch", "0", "0 or 1", _switch,
        "1: `import torch` makes torch.nn.SyncBatchNorm this package's layer; the same on all ranks",
    ),
)  # fmt: skip

# ---- Variables of others, of the build and of the tests --------------------------------------------------------------------------

MEETING = {
    "MASTER_ADDR": "the host of rank 0, where the ranks meet; if not set, taken from srun's variables, exchanged over MPI, or this host",
    "MASTER_PORT": "a free port there",
    "TORCHELASTIC_RESTART_COUNT": "how often torchrun has restarted the ranks",
    "GROUP_WORLD_SIZE": "torchrun's number of hosts",
    "SLURM_NODEID": "the host's number in the list of tasks per node",
    "SLURM_STEP_NODELIST": "srun's hosts, of which the first is rank 0's",
    "SLURM_GPUS_PER_TASK": "whether each task has GPUs of its own",
    "SLURM_TRES_PER_TASK": "the same, as newer versions of SLURM write it",
    **dict.fromkeys(JOB_IDS, "identifies the job, to choose a port"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "whether `python -m syncbn.check` reports that torch ignores SYNCBN_REPLACE_TORCH",
    "OMP_NUM_THREADS": "whether `python -m syncbn.check` reports that each rank uses all cores",
}
DEVICES = {
    "CUDA_VISIBLE_DEVICES": "whether the compiled kernels run on each GPU that this process can use",
    "CUDA_DEVICE_ORDER": "with PCI_BUS_ID a number in CUDA_VISIBLE_DEVICES means a known GPU; else, if the GPUs differ, it may mean any",
}
BUILD = {
    "SYNCBN_BUILD_CPU": "0: leave the CPU kernels out; 1: fail if they cannot be built; not set: build them if there is a C++ compiler",
    "SYNCBN_BUILD_CUDA": "the same for the CUDA kernels and nvcc",
    "TORCH_CUDA_ARCH_LIST": 'the GPUs to compile for, such as "8.0;9.0+PTX"; if not set, the ARCHITECTURES in setup.py that nvcc knows',
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
    "SYNCBN_FUZZ": "seconds of random layers; 5 if not set",
}


def markdown() -> str:
    """The tables of docs/environment.md: python -c 'from syncbn import environment; print(environment.markdown())'"""
    settings = [(v.name, v.allowed, v.default or "not set", v.meaning) for v in VARIABLES]
    launchers = [(STARTED_BY.get(row.name, row.name), *(" or ".join(names) for names in row.columns)) for row in LAUNCHERS]
    return "\n".join(
        [
            *_table("## Read when syncbn is imported", ("variable", "allowed", "default", "meaning"), settings),
            *_table("## A process's rank", ("started by", "rank", "world size", "local rank", "ranks on its host"), launchers),
            *_table("## Where the ranks meet, and what `syncbn.check` reports", ("variable", "meaning"), MEETING.items()),
            *_table("## Which GPUs a process can use", ("variable", "meaning"), DEVICES.items()),
            *_table("## Read when syncbn is built", ("variable", "meaning"), BUILD.items()),
            *_table("## Read by the tests", ("variable", "meaning"), TESTS.items()),
        ]
    )


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [title, "", *("| " + " | ".join(cells) + " |" for cells in lines), ""]
