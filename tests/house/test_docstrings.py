"""Every public class and function has an example in its docstring, and it runs; an exception needs none."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import syncbn

pytestmark = pytest.mark.world_size(1)
MODULES = [  # without MPI, which would start, a program, and the libraries, which are no modules
    name
    for _, name, _ in pkgutil.walk_packages(syncbn.__path__, "syncbn.")
    if not name.endswith((".mpi", "__main__", ".libsyncbn_cpu", ".libsyncbn_cuda"))
]
GLOBALS = {"torch": torch, "nn": torch.nn, "syncbn": syncbn, **{name: getattr(syncbn, name) for name in syncbn.__all__}}
FINDER = doctest.DocTestFinder(exclude_empty=True)
RUNNER_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=RUNNER_FLAGS)
    report: list[str] = []
    for example in FINDER.find(module, globs=GLOBALS.copy()):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", syncbn.__all__)
def test_every_public_name_has_an_example(name):
    public = getattr(syncbn, name)
    if callable(public) and not (isinstance(public, type) and issubclass(public, Exception)):
        assert ">>> " in (public.__doc__ or ""), f"syncbn.{name} has no example"


def test_dir_shows_the_public_names_only():
    names = [name for name in dir(syncbn) if not name.startswith("__")]
    assert names == sorted(syncbn.__all__)
    assert {"__all__", "__version__", "__doc__"} <= set(dir(syncbn))


def test_help_of_the_layer_says_what_a_residual_is():
    assert "residual: " in (syncbn.SyncBatchNorm.forward.__doc__ or "")
