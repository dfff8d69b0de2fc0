"""`update_bn_stats` changes the statistics, all of them or none, and nothing else."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from support.models import ResNet
from syncbn import SyncBatchNorm, SyncBatchNormalization, update_bn_stats


def snapshot(model):
    """Everything but the values of the two statistics: attributes, hooks, tensors by identity, and the values of all other tensors."""
    statistics = {id(t) for m in model.modules() if isinstance(m, _BatchNorm) for t in (m.running_mean, m.running_var)}
    tensors = {key: (id(t), None if id(t) in statistics else t.tolist()) for key, t in model.state_dict(keep_vars=True).items()}
    plain = {n: {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, str, type(None)))} for n, m in model.named_modules()}
    hooks = {n: {k: dict(v) for k, v in vars(m).items() if "hook" in k and isinstance(v, dict)} for n, m in model.named_modules()}
    return tensors, plain, hooks, torch.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True], ids=["", "an error on the way"])
def test_changes_nothing_else(world, fails):
    model = ResNet(lambda c: SyncBatchNorm(c, process_group=world.group, activation="relu"), nn.BatchNorm1d)
    model.blocks[1].eval()
    model.stem[1].register_forward_hook(lambda *args: None)
    model.head[3].momentum = None
    data = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 9)]  # the second does not fit the model
    before, statistics = snapshot(model), model.stem[1].running_mean.clone()
    if fails:
        with pytest.raises(RuntimeError):
            update_bn_stats(model, data, process_group=world.group, progress=False)
    else:
        update_bn_stats(model, data[:1], process_group=world.group, progress=False)
    assert snapshot(model) == before
    assert torch.equal(model.stem[1].running_mean, statistics) == fails  # a pass that fails changes no statistics


@pytest.mark.world_size(1)
def test_an_error_inside_a_batch_norm_leaves_its_statistics():
    class Failing(nn.BatchNorm1d):
        def forward(self, input):
            raise RuntimeError

    layer = Failing(3)
    with pytest.raises(RuntimeError):
        update_bn_stats(layer, [torch.randn(4, 3)], progress=False)
    assert layer.running_mean is not None and layer.num_batches_tracked is not None


def interrupted_at(line, function):
    """Interrupts `function` at the line of this number among those of bn_stats.py that it runs. Returns whether it came so far."""
    lines = itertools.count()

    def local(frame, event, _):
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename == syncbn.bn_stats.__file__ else None)
    try:
        function()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "with the compiler loaded"])
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(compiled, monkeypatch):
    """All new statistics or none; training flags, buffers, hooks, gradients, the compiler's stance."""
    if compiled:
        importlib.import_module("torch._dynamo")
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    data = [torch.randn(2, 3), torch.randn(3, 3) + 1]
    reference = nn.Sequential(nn.BatchNorm1d(3), SyncBatchNormalization(num_features=3))
    new = copy.deepcopy(reference)
    update_bn_stats(new, data, progress=False)
    for line in itertools.count():
        model = copy.deepcopy(reference)
        before = snapshot(model), torch.is_grad_enabled(), stance()
        came = interrupted_at(line, lambda: update_bn_stats(model, data, progress=False))  # noqa: B023
        assert (snapshot(model), torch.is_grad_enabled(), stance()) == before, line
        states = [all(torch.equal(t, m.state_dict()[key]) for key, t in model.state_dict().items()) for m in (reference, new)]
        assert sum(states) == 1, f"at line {line} some layers have new statistics"
        if not came:
            break
    assert line > 100 and states == [False, True]


def stance():
    """The stance of torch.compile, if the compiler is loaded."""
    return sys.modules["torch._dynamo"].eval_frame._stance if "torch._dynamo" in sys.modules else None
