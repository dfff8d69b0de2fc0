"""A step reaches its kernels through few functions in few files. The functions are those that are running when torch calls an op."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch

import syncbn
from syncbn import autograd, modules, ops

pytestmark = pytest.mark.world_size(1)
PACKAGE = str(Path(syncbn.__file__).parent)
MAX_FUNCTIONS, MAX_FILES = 8, 6
OPS = {
    "forward": ["batch_norm", "stats", "normalize"],
    "backward": ["batch_norm_backward", "backward_reduce", "backward_input"],
}
ENTRIES = {"forward": modules.SyncBatchNorm.forward, "backward": autograd.SyncBatchNormFunction.backward}


def running(frame: FrameType | None) -> list[CodeType]:
    """The functions of the package that are running, the outermost first."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code)
        frame = frame.f_back
    return found[::-1]


def paths_to_ops(layer: syncbn.SyncBatchNorm) -> dict[str, list[CodeType]]:
    """The functions that lead to each op in a training step without and one with a residual, which calls other ops. The first steps
    prepare what later ones use, so the second ones count."""
    functions = {id(getattr(ops, name)._op): name for names in OPS.values() for name in names}  # `_op` is the call into torch's C++
    x = torch.randn(4, 3, 5, requires_grad=True)
    for residual in (None, x):
        layer(x, residual).sum().backward()
    found = {}

    def note(frame: FrameType, event: str, called: object) -> None:
        if event == "c_call" and id(called) in functions:
            found[functions[id(called)]] = running(frame)

    sys.setprofile(note)
    try:
        for residual in (None, x):
            layer(x, residual).sum().backward()
    finally:
        sys.setprofile(None)
    return found


def shown(path: list[CodeType]) -> str:
    return "\n".join(f"{Path(code.co_filename).relative_to(PACKAGE)}: {code.co_qualname}" for code in path)


@pytest.mark.parametrize("direction", OPS)
def test_a_step_reaches_its_kernels_through_few_functions_in_few_files(direction):
    paths = paths_to_ops(syncbn.SyncBatchNorm(3, activation="relu"))
    for op in OPS[direction]:
        path = paths[op]
        assert path[0] is ENTRIES[direction].__code__
        assert len(path) <= MAX_FUNCTIONS, f"{op} is called through\n{shown(path)}"
        assert len({code.co_filename for code in path}) <= MAX_FILES, f"{op} is called through\n{shown(path)}"


def test_a_function_in_between_would_be_counted(monkeypatch):
    layer = syncbn.SyncBatchNorm(3)
    before = paths_to_ops(layer)["stats"]
    inner = modules.SyncBatchNorm._batch_norm

    def between(*arguments):
        return inner(*arguments)

    between.__code__ = between.__code__.replace(co_filename=f"{PACKAGE}/between.py")
    monkeypatch.setattr(modules.SyncBatchNorm, "_batch_norm", between)
    after = paths_to_ops(layer)["stats"]
    assert [code for code in after if code not in before] == [between.__code__]
