"""One suite for any number of ranks: `pytest`, `torchrun --nproc-per-node N -m pytest`, `mpirun -n N python -m pytest`.

Every rank runs the same tests in the same order, with the same random numbers. Markers say when a test applies:

    world_size(n, ...)   only with these numbers of ranks
    process_group        only under torchrun
    gpu                  needs a CUDA device

Tests that do not apply are deselected. `pytest` without paths and without -m leaves out two tiers:

    nightly              mutants, every Plan of the sweep, nvcc's PTX, other frameworks, and the dry run of launch/gpu_day.sh
    system               starts a job or a cluster, kills ranks, cuts links: what is in tests/system or takes `subprocess_env`

`scales` marks tests that check something new with this number of ranks: see `_scales`. On three and four ranks, and on one rank under
torchrun, launch/test.sh runs no others.
Only rank 0 reports; the others print what failed.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.overrides import _get_current_function_mode_stack

import syncbn
from support import ROOT
from support.forks import ForkServer, fork_server
from support.installed import with_entry_point
from support.paths import over_the_group
from support.processes import without_launcher
from support.step import SPLITS
from support.world import HERE, TIMEOUT, UNDER_MPI, World
from syncbn.comm import ProcessGroupCommunicator

ONE_RANK = {ROOT / "tests" / wing for wing in ("house", "kernels")}  # wings in which every test is for a single process
QUICK = "not nightly and not system"
_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--assume-gpu", action="store_true", help="with --collect-only: list the tests that a machine with a GPU would run")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # pytest redirects descriptor 2 itself, also while it imports this file, but not here
    config.addinivalue_line("markers", "world_size(*sizes): runs only with these numbers of ranks")
    config.addinivalue_line("markers", "process_group: needs torch.distributed")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "nightly: takes minutes or other frameworks; not in a plain `pytest`")
    config.addinivalue_line("markers", "system: starts jobs; not in a plain `pytest` (set by conftest.py)")
    config.addinivalue_line("markers", "scales: checks something new with this number of ranks (set by conftest.py)")
    if not _selects(config):
        config.option.markexpr = QUICK
    if HERE.rank > 0:
        config.option.verbose = -2  # errors only
        config.option.no_summary = True


def _selects(config: pytest.Config) -> bool:
    """Whether the command line chooses among the tests."""
    return config.args_source is pytest.Config.ArgsSource.ARGS or bool(config.option.markexpr)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto`: two for each core if the command line chooses the tests, since jobs of the system tier wait for timeouts most of the
    time."""
    return (os.cpu_count() or 1) * (2 if _selects(config) else 1)


def pytest_sessionstart(session: pytest.Session) -> None:
    torch.set_num_threads(1)
    if HERE.launcher == "torchrun" and not session.config.option.collectonly:
        syncbn.init_process_group(os.environ.get("SYNCBN_TEST_BACKEND", "gloo"), timeout=TIMEOUT)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """The garbage collector would visit all of torch and all tests again and again, which takes each process seconds."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # -k may pick tests that belong to another number of ranks
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Ranks do not import the folders of ONE_RANK: that takes seconds on each rank."""
    ranks = HERE.world_size > 1 or HERE.launcher == "torchrun"
    return True if ranks and collection_path in ONE_RANK else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`counts` are the rows of the batch on each rank: SPLITS of the module, or else those of support/step.py."""
    if "counts" in metafunc.fixturenames:
        splits = getattr(metafunc.module, "SPLITS", SPLITS)
        metafunc.parametrize("counts", splits.get(HERE.world_size, []), ids=str)


@pytest.hookimpl(tryfirst=True)  # before -m is evaluated
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.assume_gpu and not config.option.collectonly:
        raise pytest.UsageError("--assume-gpu needs --collect-only: without a GPU its tests do not run")
    has_gpu = torch.cuda.is_available() or config.option.assume_gpu
    kept, left_out = [], []
    for item in items:
        if not ONE_RANK.isdisjoint(item.path.parents) and _sizes(item) != [1]:
            raise pytest.UsageError(f"{item.nodeid} needs the mark world_size(1): ranks do not import its folder")
        if _scales(item):
            item.add_marker("scales")
        if item.path.is_relative_to(ROOT / "tests" / "system") or "subprocess_env" in item.fixturenames:
            item.add_marker("system")
        (kept if _fits(item, has_gpu) else left_out).append(item)
    # Tests of jobs come first, since they wait for timeouts: at the end there would be nothing else to run meanwhile.
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("system") is None)
    config.hook.pytest_deselected(items=left_out)


def _sizes(item: pytest.Item) -> list[int]:
    return [size for marker in item.iter_markers("world_size") for size in marker.args]


def _scales(item: pytest.Item) -> bool:
    """Whether the test checks something new with this number of ranks. With several ranks it does if it splits a batch over them, or if its
    marker names their number. With a single rank under torchrun it does if it needs torch.distributed, because `pytest` leaves it out;
    the others repeat what they check in a single process, since in a group of one rank a layer is unsynchronized."""
    if HERE.world_size == 1:
        return item.get_closest_marker("process_group") is not None
    return HERE.world_size in _sizes(item) or not {"counts", "numbers"}.isdisjoint(item.fixturenames)


def _fits(item: pytest.Item, has_gpu: bool) -> bool:
    sizes = _sizes(item)
    if sizes and HERE.world_size not in sizes:
        return False
    if item.get_closest_marker("process_group") and HERE.launcher != "torchrun":
        return False
    return has_gpu or not item.get_closest_marker("gpu")


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Kills this rank and dumps its stacks if a test takes too long; the launcher then kills the others. A call restarts the clock.

    The jobs that a test of the system tier starts have limits of their own, so this limit only ends a test if those do not work."""
    usual = (10 if request.node.get_closest_marker("system") else 2) * TIMEOUT

    def start(seconds: float = usual) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=request.config.stash[_STDERR])

    start()
    yield start
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same random numbers on every rank, whatever other tests run and wherever the file is."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.rpartition("/")[2].encode()))


@pytest.fixture(autouse=True)
def torchs_settings() -> Iterator[None]:
    """A test leaves torch's global settings as it found them: a later one would fail, or pass, for the wrong reason."""
    before = _settings()
    yield
    assert _settings() == before, "the test has changed a setting of torch's"


def _settings() -> list[object]:
    modes = list(map(type, _get_current_function_mode_stack()))
    return [
        modes,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    ]


@pytest.fixture(autouse=True)
def default_device(torchs_settings: None) -> Iterator[None]:
    """With SYNCBN_TEST_DEVICE=cuda, tensors created without a device go to the GPU."""
    name = os.environ.get("SYNCBN_TEST_DEVICE")
    with torch.device(name) if name else nullcontext():
        yield


@pytest.fixture(scope="session")
def world() -> World:
    group = None
    if UNDER_MPI:
        from mpi4py import MPI

        group = MPI.COMM_WORLD
        assert group.Get_size() == HERE.world_size, "mpi4py was built for another MPI than mpirun"
    return World(HERE.rank, HERE.world_size, group)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors are."""
    return request.param


@pytest.fixture(params=["alone", "NCCL"])
def group_of_one(request: pytest.FixtureRequest) -> Iterator[ProcessGroupCommunicator | None]:
    """None (no communication), or a one-rank NCCL group that really runs the collectives."""
    if request.param == "alone":
        yield None
    else:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        yield ProcessGroupCommunicator(dist.group.WORLD)
        dist.destroy_process_group()


@pytest.fixture
def group_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers exchange over their groups, although they could share memory."""
    over_the_group(monkeypatch)


@pytest.fixture(params=["shared memory", "group"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the layers exchange."""
    if request.param == "group":
        over_the_group(monkeypatch)
    return request.param


@pytest.fixture(scope="session")
def subprocess_env() -> dict[str, str]:
    """The environment for a job that a test starts: without this run's own launcher's variables."""
    return without_launcher(os.environ) | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def forks(subprocess_env: dict[str, str]) -> Iterator[ForkServer]:
    """Starts the ranks of a job, for tests that are about neither launchers nor the import of torch."""
    with fork_server(subprocess_env) as server:
        yield server


@pytest.fixture(scope="session")
def installed(subprocess_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment for a process in which `import torch` finds this package's entry point."""
    return with_entry_point(subprocess_env, tmp_path_factory.mktemp("installed"))
