"""What `syncbn._torch_private` takes from torch does what its docstring says; if torch lacks the name, the fallback does."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from syncbn import _torch_private as private

pytestmark = pytest.mark.world_size(1)


def without(monkeypatch: pytest.MonkeyPatch, *paths: str) -> Any:
    """`_torch_private` as a torch without these names would import it."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        monkeypatch.delattr(f"torch.{owner}.{name}" if owner else f"torch.{name}")
    spec = importlib.util.spec_from_file_location("syncbn_torch_private_without", private.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_vmap(seen: Callable[[Tensor], Any]) -> Any:
    result = []
    torch.vmap(lambda t: result.append(seen(t)) or t)(torch.ones(2, 3))  # type: ignore[func-returns-value]
    return result[0]


def in_batched_backward(seen: Callable[[Tensor], Any]) -> Any:
    result = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: result.append(seen(grad)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    return result[0]


def in_backward_pass(seen: Callable[[], Any]) -> Any:
    result = []
    y = torch.ones(3, requires_grad=True) * 2
    y.register_hook(lambda grad: result.append(seen()))
    y.sum().backward()
    return result[0]


def in_make_fx(seen: Callable[[], Any]) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    result = []
    make_fx(lambda t: result.append(seen()) or t * 2)(torch.ones(2))  # type: ignore[func-returns-value]
    return result[0]


def dual() -> Tensor:
    return forward_ad.make_dual(torch.ones(2), torch.ones(2))


def fake() -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2)


# ---- Where a call comes from -------------------------------------------------------------------------------------------------


def test_is_transformed_inside_every_transform_of_torch_func():
    x = torch.ones(3)
    seen: list[bool] = []

    def f(t: Tensor) -> Tensor:
        seen.append(private.is_transformed())
        return t.sum()

    torch.func.grad(f)(x)
    torch.func.jvp(f, (x,), (x,))
    torch.vmap(f)(x[None])
    torch.func.functionalize(f)(x)
    assert seen == [True] * 4
    assert not private.is_transformed()


@pytest.mark.parametrize("lacking", [False, True], ids=["private", "fallback"])
def test_has_tangent_of_dual_numbers_only(monkeypatch, lacking):
    if lacking:  # torch's own function reads the name, too
        monkeypatch.setattr(private, "forward_ad", SimpleNamespace(unpack_dual=forward_ad.unpack_dual))
    assert not private.has_tangent(torch.ones(2))
    with forward_ad.dual_level():
        assert private.has_tangent(dual()) and not private.has_tangent(torch.ones(2))


def test_is_batched_in_vmap_and_in_batched_gradients():
    assert in_vmap(private.is_batched) and in_batched_backward(private.is_batched)
    assert not private.is_batched(torch.ones(2))


@pytest.mark.parametrize("lacking", [[], ["_subclasses.FakeTensor"]], ids=["private", "fallback"])
def test_is_fake_of_fake_tensors_only(monkeypatch, lacking):
    t = fake()
    module = without(monkeypatch, *lacking) if lacking else private
    assert module.is_fake(t)
    assert not module.is_fake(torch.ones(2)) and not module.is_fake(torch.ones(2, device="meta"))


def test_is_traced_by_make_fx_while_it_traces():
    assert in_make_fx(private.is_traced_by_make_fx) and not private.is_traced_by_make_fx()


@pytest.mark.parametrize("lacking", ["_C._get_dispatch_mode", "_C._TorchDispatchModeKey"])
def test_without_the_name_torch_fx_is_asked_whether_it_traces(monkeypatch, lacking):
    module = without(monkeypatch, lacking)
    monkeypatch.undo()  # make_fx needs it
    assert in_make_fx(module.is_traced_by_make_fx) and not module.is_traced_by_make_fx()


def test_in_backward_while_autograd_runs_its_graph():
    assert in_backward_pass(private.in_backward) and not private.in_backward()


def test_is_dispatched_by_as_many_modes_as_are_active():
    assert private.is_dispatched() == 0
    with FakeTensorMode(), create_selective_checkpoint_contexts([])[0]:
        assert private.is_dispatched() == 2
    assert in_make_fx(private.is_dispatched) and private.is_dispatched() == 0


def test_is_profiling_under_either_profiler():
    for profiler in (torch.profiler.profile, torch.autograd.profiler.profile):
        with profiler():
            assert private.is_profiling()
    assert not private.is_profiling()


@pytest.mark.parametrize(
    "name, lacking, fallback",
    [
        ("is_transformed", ["_C._functorch.peek_interpreter_stack"], False),
        ("is_transformed", ["_C._functorch"], False),
        ("in_backward", ["_C._current_graph_task_id"], False),
        ("is_profiling", ["autograd._profiler_enabled"], True),
        ("is_dispatched", ["_C._len_torch_dispatch_stack"], 1),
    ],
)
def test_without_its_name_a_question_has_one_answer(monkeypatch, name, lacking, fallback):
    module = without(monkeypatch, *lacking)
    monkeypatch.undo()
    assert getattr(module, name)() is fallback
    assert in_backward_pass(getattr(module, name)) is fallback


def test_packs_by_the_innermost_hooks(monkeypatch):
    module = without(monkeypatch, "_C._autograd._top_saved_tensors_default_hooks")
    with torch.autograd.graph.saved_tensors_hooks(abs, abs):
        assert private.packs(abs) and not private.packs(id)
        with torch.autograd.graph.save_on_cpu():
            assert not private.packs(abs) and module.packs(abs)
    assert not private.packs(abs)


def test_without_its_names_nothing_is_batched(monkeypatch):
    module = without(monkeypatch, "_C._functorch.is_batchedtensor", "_C._functorch.is_legacy_batchedtensor")
    monkeypatch.undo()
    assert in_vmap(module.is_batched) is False and in_batched_backward(module.is_batched) is False


def test_the_compiler_is_loaded_once_something_is_compiled(monkeypatch):
    torch.compile(lambda t: t + 1, backend="eager")(torch.ones(2))
    assert private.is_compiler_loaded()
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert not private.is_compiler_loaded()


def test_a_constant_in_graphs_is_not_traced():
    @private.constant_in_graphs
    def name():
        return "a" if gc.isenabled() else "b"  # torch.compile cannot trace the question

    def scaled(t):
        return t * len(name())

    assert torch.equal(torch.compile(scaled, backend="eager", fullgraph=True)(torch.ones(2)), torch.ones(2))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


@pytest.mark.parametrize("lacking", [False, True], ids=["private", "fallback"])
def test_eager_apply_of_an_autograd_function_is_its_apply(monkeypatch, lacking):
    if lacking:  # as if torch's class did not override its base's method
        monkeypatch.setattr(private, "super", lambda *_: object(), raising=False)
    apply = private.eager_apply(Doubled)
    is_overridden = isinstance(vars(torch.autograd.Function)["apply"], classmethod)  # in Python, before torch 2.14
    assert (apply == Doubled.apply) is (lacking or not is_overridden)
    x = torch.ones(3, requires_grad=True)
    y = apply(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, 2 * x) and torch.equal(dx, torch.full((3,), 2.0))


# ---- Modules -----------------------------------------------------------------------------------------------------------------


def test_the_bases_of_torchs_batch_norms_are_found(monkeypatch):
    bases = private._BatchNorm, private._LazyNormBase
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d)
    assert all(issubclass(cls, bases[0]) for cls in batch_norms)
    assert not issubclass(nn.InstanceNorm2d, bases[0]) and issubclass(nn.LazyBatchNorm1d, bases[1])
    module = without(monkeypatch, "nn.modules.batchnorm._BatchNorm")
    assert (module._BatchNorm, module._LazyNormBase) == bases


@pytest.mark.parametrize("registries", [True, False], ids=["private", "fallback"])
def test_tensors_of_are_the_attributes(monkeypatch, registries):
    monkeypatch.setattr(private, "_HAS_REGISTRIES", registries)
    plain, frozen, parametrized = nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    for module in (plain, frozen, parametrized):
        names = ("bias", "running_mean", "running_var", "num_batches_tracked")
        assert all(t is getattr(module, name) for t, name in zip(private.tensors_of(module, names), names, strict=True))
    (weight,) = private.tensors_of(parametrized, ["weight"])
    assert torch.equal(weight, parametrized.weight)
    assert private.tensors_of(plain, ["weight"])[0] is plain.weight and private.tensors_of(frozen, ["weight"]) == [None]
    with pytest.raises(AttributeError, match="gamma"):
        private.tensors_of(plain, ["gamma"])


@pytest.mark.parametrize("registries", [True, False], ids=["private", "fallback"])
def test_registered_names_are_those_of_parameters_buffers_and_submodules(monkeypatch, registries):
    monkeypatch.setattr(private, "_HAS_REGISTRIES", registries)
    layer = nn.BatchNorm2d(3, affine=False)
    layer.act = nn.ReLU()
    missing = {"weight", "bias"} if registries else set()
    assert private.registered_names(layer) == {"running_mean", "running_var", "num_batches_tracked", "act"} | missing


KINDS = [name for name in dir(nn.Module) if name.startswith("register_") and name.endswith("_hook") and "state_dict" not in name]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_every_kind_are_seen(kind):
    module = nn.BatchNorm2d(3)
    assert not private.has_hooks(module)
    handle = getattr(module, kind)(lambda *_: None)
    assert private.has_hooks(module)
    handle.remove()
    assert not private.has_hooks(module)


def test_hooks_on_state_dicts_see_no_input():
    module = nn.BatchNorm2d(3)
    module.register_state_dict_pre_hook(lambda *_: None)
    module.register_load_state_dict_post_hook(lambda *_: None)
    assert not private.has_hooks(module)


def test_there_are_kinds_of_hooks():
    assert len(KINDS) >= 4


def test_without_its_hooks_a_lazy_module_is_not_built_by_a_call():
    lazy = nn.LazyBatchNorm2d()
    private.remove_lazy_hooks(lazy)
    with pytest.raises(ValueError, match="uninitialized"):  # torch's own words
        lazy.eval()(torch.ones(2, 3, 4, 4))
    private.remove_lazy_hooks(nn.BatchNorm2d(3))
