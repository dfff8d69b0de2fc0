"""Every use that the package makes of torch's private names: one function, or one name, for each use.

A private name is used if no public one does the same, or if the public one is slower. Each use says what happens with a torch that lacks
the name. The names are in the sources of torch 2.11.0, 2.12.1, 2.13.0, 2.14.1 and 2.15.0; tests/house/test_torch_private.py checks what
they do in the torch at hand, and most fallbacks.

Two methods of torch are overridden besides: `_BatchNorm._check_input_dim` and `Module._load_from_state_dict`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch.autograd import forward_ad

try:
    # The base that torch's batch norms share. DistributedDataParallel, FSDP and every converter recognize a batch norm by it.
    from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
except ImportError:  # under other names
    _BatchNorm, _LazyNormBase = nn.BatchNorm2d.__bases__[0], nn.LazyBatchNorm2d.__bases__[0]  # type: ignore[misc, assignment]


def _private(path: str) -> Any:
    """What torch has under this dotted name; None if there is nothing."""
    value: Any = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


# ---- Where a call comes from, and autograd -----------------------------------------------------------------------------------

_peek_interpreter_stack = _private("_C._functorch.peek_interpreter_stack")
_is_batched: list[Callable[[Tensor], bool]] = [
    test for test in map(_private, ("_C._functorch.is_batchedtensor", "_C._functorch.is_legacy_batchedtensor")) if test
]
_current_graph_task_id = _private("_C._current_graph_task_id")
_profiler_enabled = _private("autograd._profiler_enabled")
_get_dispatch_mode = _private("_C._get_dispatch_mode")
_proxy_mode_key = _private("_C._TorchDispatchModeKey.PROXY")
_fake_tensor_class = _private("_subclasses.FakeTensor")
_innermost_hooks = _private("_C._autograd._top_saved_tensors_default_hooks")


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap) runs this code. Its tensors are of the usual class.

    Fallback: False. torch then says that the autograd function lacks a static method."""
    return _peek_interpreter_stack is not None and _peek_interpreter_stack() is not None


def has_tangent(t: Tensor) -> bool:
    """Whether t is a dual number of forward-mode differentiation. Outside of `dual_level`, `_current_level` saves a call of `unpack_dual`,
    1 µs. Fallback: `unpack_dual`, which is public."""
    return getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(t).tangent is not None


def is_batched(t: Tensor) -> bool:
    """Whether t stands for several tensors: in `torch.vmap`, or in a backward pass with `is_grads_batched=True`.

    Fallback: False. The exchange then fails in the backend, after the other ranks have begun theirs."""
    for test in _is_batched:  # noqa: SIM110, a generator costs more than the tests
        if test(t):
            return True
    return False


def is_fake(t: Tensor) -> bool:
    """Whether t is a FakeTensor, which has a shape but no values. Fallback: by the name of its class."""
    return isinstance(t, _fake_tensor_class) if _fake_tensor_class else any(cls.__name__ == "FakeTensor" for cls in type(t).__mro__)


def is_traced_by_make_fx() -> bool:
    """Whether torch.compile, or make_fx, records a graph: torch.utils.checkpoint asks the same way.

    Fallback: torch.fx's function for it, which loads a large part of the compiler."""
    if _get_dispatch_mode is not None and _proxy_mode_key is not None:
        return _get_dispatch_mode(_proxy_mode_key) is not None
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


# How many dispatch modes see each op before it runs: selective checkpointing's, FakeTensorMode, those of tracers. Fallback: 1, as if there
# were one. The name is torch's function itself, because most steps of a layer in a single process ask.
is_dispatched: Callable[[], int] = _private("_C._len_torch_dispatch_stack") or (lambda: 1)


def in_backward() -> bool:
    """Whether autograd's engine runs this code: a forward pass in it can only be a recomputation.

    Fallback: False. A checkpoint without `checkpoint_contexts` then moves the running statistics twice, as torch's layers do."""
    return _current_graph_task_id is not None and _current_graph_task_id() != -1


# Whether a profiler runs: only then is a range worth its microseconds. Fallback: True, ranges are always opened. The name is torch's
# function itself, because each exchange asks.
is_profiling: Callable[[], bool] = _profiler_enabled or (lambda: True)


def is_compiler_loaded() -> bool:
    """Whether anything can have been compiled: to ask torch.compiler would load the compiler, which takes seconds.

    Fallback: none is needed. If the module has another name, the answer is False, and `update_bn_stats` leaves compiled layers compiled."""
    return "torch._dynamo" in sys.modules


def version_of(t: Tensor) -> int:
    """How often t's memory has been changed in place. Fallback: 0. The change of an output, or of an input, after a layer's call is then
    not noticed by `recompute_outputs`."""
    return getattr(t, "_version", 0)


def packs(pack: Callable[[Tensor], Any]) -> bool:
    """Whether the innermost saved-tensor hooks, the only ones that torch applies, are those of `pack`.

    Fallback: True. A checkpoint or a `save_on_cpu` inside `recompute_outputs` then frees no layer's input."""
    hooks = (pack, None) if _innermost_hooks is None else _innermost_hooks(False)
    return hooks is not None and hooks[0] is pack


def eager_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for eager code outside of torch.func: the method that `apply` overrides, which saves the 3 µs in which `apply`
    looks for transforms and binds arguments.

    Fallback: `function.apply`, which in torch 2.14 and newer overrides nothing, and does both in C++."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


# ---- Modules -----------------------------------------------------------------------------------------------------------------

_HAS_REGISTRIES = {"_parameters", "_buffers", "_modules"} <= vars(nn.Module()).keys()


def tensors_of(module: nn.Module, names: Iterable[str]) -> list[Tensor | None]:
    """The module's parameters and buffers of these names. As attributes they cost as much as a small kernel: Python first raises an
    AttributeError for each.

    Fallback: the attributes. They also serve tensors that are parametrized or replicated, which are in neither registry."""
    if not _HAS_REGISTRIES:
        return [getattr(module, name) for name in names]
    parameters, buffers = module._parameters, module._buffers
    tensors = []  # by a loop, because up to Python 3.11 a comprehension costs a function call
    for name in names:
        tensors.append(parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(module, name))
    return tensors


def registered_names(module: nn.Module) -> set[str]:
    """The names of the module's parameters, buffers and submodules, those that are None included.

    Fallback: without those that are None."""
    if _HAS_REGISTRIES:
        return {*module._parameters, *module._buffers, *module._modules}
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *module.named_children())
    return {name for name, _ in named}


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see the module's input, output or gradients. torch keeps each kind in a dictionary and offers no list of them.

    Fallback: none; the test registers a hook of each kind that torch has, so that it notices a new one."""
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks") and name[0] == "_" and "state_dict" not in name)


def remove_lazy_hooks(module: nn.Module) -> None:
    """Removes, from a module that has been built, the hooks with which torch's `LazyModuleMixin` builds it at its first call.

    Fallback: none is needed. Hooks under other names stay, and find the module built."""
    for hook in ("_load_hook", "_initialize_hook"):
        if hook in vars(module):
            getattr(module, hook).remove()


def forget_compiled(module: nn.Module) -> None:
    """Makes a copy of a module forget the code of `module.compile()`, which would call the original. torch leaves it out of pickles, too.

    Fallback: none is needed. Under another name the code stays."""
    vars(module).pop("_compiled_call_impl", None)


# ---- torch.nn.SyncBatchNorm, for replace_torch -------------------------------------------------------------------------------

_refuses_cpu = vars(nn.parallel.DistributedDataParallel).get("_passing_sync_batchnorm_handle")


def is_torchs_layer_replaced() -> bool:
    return nn.SyncBatchNorm.__bases__ != (_BatchNorm,)


def set_base_of_torchs_layer(base: Any) -> None:
    """Gives torch.nn.SyncBatchNorm another base; None for its own. CPython lets a class's bases be changed, but no documentation
    promises it.

    No fallback: if the classes' layouts differ, a TypeError, after which nothing has changed."""
    nn.SyncBatchNorm.__bases__ = (_BatchNorm if base is None else base,)


def set_refusal_of_cpu_by_ddp(refuse: bool) -> None:
    """Sets whether DistributedDataParallel refuses a model on the CPU that has instances of torch.nn.SyncBatchNorm. The method that is
    replaced does nothing but refuse.

    Fallback, without the method: nothing, because there is no refusal to turn off."""
    if _refuses_cpu is not None:
        accept = lambda self, module: None  # noqa: E731
        nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = _refuses_cpu if refuse else accept  # type: ignore[method-assign]


# ---- torch.distributed -------------------------------------------------------------------------------------------------------


def all_reduce_in_graph(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of `group`, which is a group or the name of one, in the form that a compiled graph can hold.

    No fallback: a graph cannot hold an in-place collective."""
    return functional_collectives.all_reduce(tensor, "sum", group)


def constant_in_graphs(function: Callable[[], str]) -> Callable[[], str]:
    """What torch.compiler.assume_constant_result does, without loading the compiler: that takes as long as all of `import torch`.

    Fallback: none. torch.compile then traces into the function, and reports what it cannot trace."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_collective_in_graph(op: Any) -> bool:
    """Whether an op of a graph has the namespace of collectives such as `all_reduce_in_graph` makes. No fallback: a checkpoint's
    recomputation would exchange again, on all ranks."""
    return op.namespace in ("_c10d_functional", "c10d_functional")


def timeout_of_backend(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """How long the group's backend for this device waits for the other ranks. Fallback, also for a backend without options: None."""
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


def default_store() -> dist.Store:
    """The store over which the ranks of the default group met. No fallback: an AttributeError."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def join_configs_restored(joinables: Iterable[Any]) -> Iterator[None]:
    """Gives the joinables of a `Join` that ends inside their configurations from before it. torch leaves them joined, and such a
    DistributedDataParallel exchanges in each forward pass, in eval mode, too.

    Fallback: as torch leaves them."""
    before = [(joinable, joinable._join_config) for joinable in joinables if hasattr(joinable, "_join_config")]
    try:
        yield
    finally:
        for joinable, config in before:
            joinable._join_config = config


class SymmetricMemory(NamedTuple):
    """Memory of this rank's GPU that the other ranks have mapped, and the memory of theirs that this rank has mapped."""

    own: Tensor  # uint8
    addresses: list[int]  # of each rank's memory, in this process
    handle: Any  # keeps the other ranks' memory mapped


def symmetric_memory(size: int, group: dist.ProcessGroup, device: torch.device) -> SymmetricMemory:
    """`size` zero bytes on each rank's GPU. Every rank of the group calls it. The module of torch is documented, as an alpha feature
    (`torch.distributed._symmetric_memory`), and nothing public maps the memory of another process's GPU.

    No fallback: an error, whose message becomes the reason why the ranks use their group's collectives instead."""
    symmetric = importlib.import_module("torch.distributed._symmetric_memory")
    own = symmetric.empty(size, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize(device)  # before another rank can write to it
    handle = symmetric.rendezvous(own, group)
    offset = getattr(handle, "offset", 0)  # of the tensor in its allocation; older versions have one allocation for each tensor
    return SymmetricMemory(own, [address + offset for address in handle.buffer_ptrs], handle)
