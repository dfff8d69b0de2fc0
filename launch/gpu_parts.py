"""The commands of gpu_day.sh, with their limits. gpu_day.py runs and checks them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / ".gpu"  # by launch/gpu_build.sh
OUT = Path(os.environ.get("OUT", "out/gpu"))  # the results
LIBRARY = ROOT / "syncbn" / "libsyncbn_cuda.so"
OPS = ("stats", "normalize", "backward_reduce", "backward_input")


@dataclass(frozen=True)
class Part:
    """Commands that share a limit and a file of results.

    The summary has the last `lines` lines of their output that `shows`, a regular expression, matches. The part has failed if a command
    cannot start or exits with another status than 0, if the limit ends it, or if its output has no match of `requires`.
    """

    name: str
    limit: int  # seconds
    commands: tuple[tuple[str, ...], ...]
    lines: int
    shows: str = r"\S"
    requires: str = ""
    vital: bool = False  # if it fails, the results of all later parts are worthless
    env: dict[str, str] = field(default_factory=dict)


def pytest_command(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments


def torchrun(ranks: int, command: tuple[str, ...], environment: str = "") -> tuple[str, ...]:
    """`command` in this many ranks; each exports `environment`, in which bash replaces $RANK."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python")
    return *launcher, "bash", "-c", f'export {environment}; exec "$0" "$@"', *command


def sanitizers() -> Part:
    """A dozen tests for each tool: the reductions on planes in pieces and channels in vectors, and all ops on misaligned tensors."""
    cases = "kernel_equals and (stats or reduce) and (97 and first or 256 and last) and bfloat16 or misaligned and last"
    env = {"TOOLS": "memcheck racecheck", "CASES": cases, "PYTHON": sys.executable}
    return Part("sanitizers", 90, (("launch/sanitize.sh",),), 8, r"passed|failed|=====|sanitize.sh:|^== ", " passed", env=env)


def sweeps() -> tuple[tuple[str, ...], ...]:
    """First the current code, then that of an earlier revision if there is one."""
    programs = [BUILT / f"sweep_{op}_now" for op in OPS] + [BUILT / f"sweep_{op}_before" for op in OPS]
    return tuple((str(path.relative_to(ROOT)),) for path in programs if path.exists() or path.stem.endswith("_now"))


KERNELS = "tests/kernels/test_gpu_kernels.py"
PAIRS = "tests/kernels/test_pairs.py"
LAYER = ("tests/layer/test_cuda_graphs.py", "tests/layer/test_gpu_layer.py")
TWO_RANKS = pytest_command("tests/layer/test_layer.py", "-m", "gpu")
SOME = "whole_batch and float32 or alarms and cuda"  # all of them would take minutes: over gloo, a test of two ranks takes half a second
NCCL = "NCCL_HOSTID=$RANK NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1"  # NCCL refuses two ranks on a GPU, unless their hosts differ
PEERS = "SYNCBN_PEER=1 TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 SYNCBN_TEST_BACKEND=gloo"  # the ranks may share one GPU
CLOCKS = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
TESTS = {"lines": 3, "shows": "^FAILED|^ERROR|passed|failed|error", "requires": " passed"}
GRAPHS_AND_LAUNCHES = ("-k", "captured or graphed or launches or wait or plain")
# For each of the runs 1, 2 and 3, its limit in seconds and groups of parts, one after the other; the parts of a group run side by side.
RUNS: dict[str, tuple[int, list[tuple[Part, ...]]]] = {
    # Correctness. Most tests leave the GPU idle, so they run side by side, except those that fill its memory.
    "1": (200, [
        (Part("check", 45, (("nvidia-smi", CLOCKS, "--format=csv"), (sys.executable, "-m", "syncbn.check")), 4, "NVIDIA|^cuda|layer",
              r"cuda +compiled kernels", vital=True),),
        (
            Part("kernels", 90, (pytest_command("-n", "6", KERNELS, PAIRS, "-k", "not more_than and not memory"),), **TESTS),
            Part("layer", 90, (pytest_command(*LAYER, *GRAPHS_AND_LAUNCHES),), **TESTS),
            Part("alone", 90, (pytest_command(*LAYER, "-k", "single_rank"),), **TESTS),
            sanitizers(),
            Part("gloo", 90, (torchrun(2, (*TWO_RANKS, "tests/comm/test_alarms.py", "-k", SOME), "SYNCBN_TEST_BACKEND=gloo"),), **TESTS),
            Part("nccl", 90, (torchrun(2, (*TWO_RANKS, "-k", SOME), f"SYNCBN_TEST_BACKEND=cpu:gloo,cuda:nccl {NCCL}"),), **TESTS),
        ),
        (Part("large", 30, (pytest_command(KERNELS, "-k", "more_than or memory or streams or graph"),), **TESTS),),
    ]),
    # Speed. Only one part runs at a time.
    "2": (200, [
        (Part("sweep", 60, sweeps(), 32, "^# best", "# best"),),
        (Part("benchmark", 95, ((sys.executable, "-m", "benchmarks", "--device", "cuda", "--quick", "--networks", "--out", str(OUT)),), 14,
              "[│┃]|^written", "^written"),),
        (Part("launches", 45, ((sys.executable, "-m", "benchmarks.launches", "--device", "cuda"),), 10, "[│┃]", "°C after"),),
    ]),
    # Peer memory, for two GPUs or more. On a single GPU, which two ranks then share, all but the benchmark works.
    "3": (200, [
        (
            Part("cards", 5, (("nvidia-smi", CLOCKS, "--format=csv"), ("nvidia-smi", "topo", "-m")), 12),
            Part("path", 40, (torchrun(2, (sys.executable, "-m", "syncbn.check"), PEERS),), 3, "^exchange|layer|^problem",
                 "exchange in each other's GPU memory"),
        ),
        (Part("laws", 55, (torchrun(2, pytest_command("tests/comm/test_peers.py", "-m", "gpu"), PEERS),), **TESTS),),
        (Part("table", 50, (torchrun(2, (*TWO_RANKS, "-k", SOME), PEERS),), **TESTS),),
        (Part("peers", 55, (torchrun(2, (sys.executable, "-m", "benchmarks.peers"), "SYNCBN_CHECK=first"),), 12, "[│┃]|needs|rank",
              "peer memory|needs two ranks"),),
    ]),
}  # fmt: skip
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "SYNCBN_TEST_TIMEOUT": "80", "OMP_NUM_THREADS": "2"}
