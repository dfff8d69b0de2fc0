"""Traces a model with torch.fx: the whole model if possible, else each submodule that torch.fx can trace."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .._torch_private import _BatchNorm, has_hooks
from .encapsulation import has_forward, units

_LIBRARIES = tuple(str(Path(path).parent) for path in (torch.__file__, __file__))


class Region(NamedTuple):
    """A part of a model that torch.fx can trace."""

    module: nn.Module
    graphs: list[fx.Graph]  # one for each training flag and each way to call the module
    exclusive: set[nn.Module]  # the modules in it that the model holds nowhere else


def record_in_fx_graph(module: nn.Module, *inputs: Any) -> Any:
    """Records one call of the module, as torch.fx does for torch's own layers, without looking inside. Inputs that are None are dropped."""
    tracer, arguments = inputs[0].tracer, tuple(value for value in inputs if value is not None)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def regions(root: nn.Module, modes: tuple[bool, ...]) -> tuple[list[Region], list[str]]:
    """The parts of `root` that contain a batch norm and that torch.fx can trace, and a message for each line where tracing failed.

    `modes` are the training flags to trace with. Afterwards each module has its own training flag again, and its other attributes: the
    model's code may set some to traced values, and torch.fx keeps constants in the model.
    """
    before = {m: (m.training, dict(vars(m))) for m in root.modules()}
    try:
        return _regions(root, modes)
    finally:
        for m, (training, attributes) in before.items():
            vars(m).clear()
            vars(m).update(attributes)
            m.training = training  # a scripted module does not have it in vars()


def _regions(root: nn.Module, modes: tuple[bool, ...]) -> tuple[list[Region], list[str]]:
    uses = _count_uses(root)
    traced: list[Region] = []
    failures: dict[str, str] = {}  # by line, because a module fails at the same line as the submodule that cannot be traced
    pending = [root]
    for module in pending:  # grows during the loop
        if not any(isinstance(m, _BatchNorm) for m in module.modules() if m is not module):
            continue
        try:
            graphs = [graph for mode in modes for graph in _traces(module, mode)]
        except Exception as error:  # the model's code may raise anything when it gets a traced value
            if has_forward(module) or "forward" in vars(module):
                line = _line(error)
                failures[line] = f"{type(module).__name__}{line}: {str(error).partition(chr(10))[0]}"
            pending += [unit for _, unit in units(module)]
        else:
            traced.append(Region(module, graphs, {m for m, count in _count_uses(module).items() if count == uses[m]}))
    return traced, list(failures.values())


def warn_of(failures: list[str], function: str, done: str, stacklevel: int) -> None:
    """Warns that torch.fx could not trace the whole model. `stacklevel` leads from here to the caller of the public function."""
    if failures:
        reasons = "; ".join(failures)
        warnings.warn(
            f"{function}: torch.fx cannot trace the whole model, so only traceable submodules are {done} ({reasons})", stacklevel=stacklevel
        )


def _count_uses(root: nn.Module) -> Counter[nn.Module]:
    """How often each module is registered in `root`."""
    return Counter(m for _, m in root.named_modules(remove_duplicate=False))


def _traces(module: nn.Module, mode: bool) -> list[fx.Graph]:
    """Graphs of `module`, traced with all arguments and again with only the required ones, because code may test `if y is None`."""
    for m in module.modules():
        m.training = mode  # not by train(), which classes override: a frozen layer would remember the mode
    if "forward" in vars(module):
        raise ValueError("torch.fx would trace the forward of its class, but this instance replaces it")
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return [Tracer().trace(module), *([Tracer().trace(module, concrete_args=defaults)] if defaults else [])]


def _line(error: Exception) -> str:
    """`, model.py:12 "if x.sum() > 0:"`: the last line that belongs to the model's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    return f', {Path(frames[-1].filename).name}:{frames[-1].lineno} "{frames[-1].line}"' if frames else ""


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else the model's code would change its buffers, and values computed from them would be constants

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Does not call the hooks of a module that is traced through, which would get traced values. A node stands for them."""
        if not has_hooks(m) or self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        output = super().call_module(m, m.forward, args, kwargs)
        self.create_proxy("call_function", has_hooks, (args, kwargs, output), {})
        return output

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def producer(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The module call whose output is the first input of `node`, skipping identities. None if that input comes from anything else, or if
    another node uses a value in between."""
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
        module = modules[str(source.target)]
        if type(module) is not nn.Identity or is_observed(module) or len(source.args) != 1 or source.kwargs:
            return source
        source = source.args[0]
    return None


def is_observed(module: nn.Module) -> bool:
    """Whether hooks, the instance's own forward, or code compiled by torch.jit see the input or output, which fusing would change."""
    return has_hooks(module) or "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule)
