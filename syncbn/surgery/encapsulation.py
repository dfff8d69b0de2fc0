"""Finds the submodules that a module only calls, by reading the source of its class.

It is for modules that torch.fx cannot trace. A submodule that the code only calls is a unit. So is each element of a container, if the code
only calls the container's elements, in a loop or by index. Only the forward of a unit uses the layers inside, so two layers that are
adjacent there may be fused. Any other use of `self` or of a submodule counts as access to the layers inside, if it can call them:
`self.parameters()` cannot.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

# Methods and attributes of nn.Module, and functions, through which code can reach submodules other than as `self.name`.
_OPENERS = {
    "children", "named_children", "modules", "named_modules", "_modules", "get_submodule", "apply",
    "getattr", "__getattr__", "vars", "__dict__",
}  # fmt: skip
_ELEMENTS = {"items", "values", "pop", "__iter__", "__getitem__"}  # the same in a subclass of a container
_HARMLESS = {"hasattr", "isinstance", "type", "super", "getattr"}  # given `self`, these reach no submodule; `_opens` checks getattr
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_KNOWN_BASES = (*_CONTAINERS, nn.Module, object)  # the forward of any other class of torch may use the layers inside its submodules


def units(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, submodule) of the units directly in `module`, or in a container whose elements it calls."""
    if type(module) in _CONTAINERS:
        return list(module.named_children())
    if "forward" in vars(module):
        return []
    try:
        code = _Code(type(module))
    except (OSError, TypeError, SyntaxError):  # a class without a source file, such as one typed into an interpreter
        return []
    if any(_holds_modules(value) for name, value in vars(module).items() if name in code.names):
        return []
    result: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if code.only_calls(name) and has_forward(child):
            result.append((name, child))
        elif code.only_calls_elements(name) and isinstance(child, _CONTAINERS):
            result += [(f"{name}.{element}", unit) for element, unit in child.named_children()]
    return result


def has_forward(module: nn.Module) -> bool:
    """False for a list or dictionary of modules, unless it is of a subclass with a forward."""
    return type(module).forward is not nn.Module.forward


class _Code:
    """The syntax trees of the methods that a class's forward reaches, including those of its bases outside torch."""

    def __init__(self, cls: type) -> None:
        self.parents: dict[ast.AST, ast.AST] = {}
        self.nodes: list[ast.AST] = []
        bases = [base for base in cls.__mro__ if base not in _KNOWN_BASES]
        self.openers = _OPENERS | (_ELEMENTS if issubclass(cls, _CONTAINERS) else set())
        # Whether the code may reach any submodule: then none is a unit.
        self.opened = any(base.__module__.startswith("torch.") for base in bases)
        pending = ["forward"]
        for name in pending:  # grows during the loop
            for base in bases:
                for node in self._read(vars(base).get(name)):
                    used = _name(node)
                    if used not in pending and any(used in vars(b) for b in bases):
                        pending.append(used)
        self.names = {_name(node) for node in self.nodes}
        self.opened = self.opened or any(self._opens(node) for node in self.nodes)

    def _read(self, method: Any) -> list[ast.AST]:
        """Adds the nodes of a method's source to `nodes` and returns them; [] for anything else."""
        method = method.fget if isinstance(method, property) else getattr(method, "func", method)  # a cached_property
        if not inspect.isfunction(method):
            return []
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        arguments = tree.body[0].args.args if isinstance(tree.body[0], ast.FunctionDef) else []
        self.opened = self.opened or not arguments or arguments[0].arg != "self"
        nodes = list(ast.walk(tree))
        for parent in nodes:
            self.parents.update(dict.fromkeys(ast.iter_child_nodes(parent), parent))
        self.nodes += nodes
        return nodes

    def only_calls(self, name: str) -> bool:
        return not self.opened and all(self._is_called(use) or self._is_tested(use) for use in self._uses(name))

    def only_calls_elements(self, name: str) -> bool:
        return not self.opened and all(self._is_called_by_index(use) or self._is_looped_over(use) for use in self._uses(name))

    def _opens(self, node: ast.AST) -> bool:
        """Whether `node` may reach any submodule: through a method that lists them, or because `self` is used as a whole."""
        if isinstance(node, ast.Name) and node.id == "self":
            parent = self.parents[node]
            return not isinstance(parent, ast.Attribute) and not (isinstance(parent, ast.Call) and ast.unparse(parent.func) in _HARMLESS)
        name = _name(node)
        return name in self.openers and not (name == "getattr" and _literal(self.parents[node]) is not None)

    def _uses(self, name: str) -> Iterator[ast.AST]:
        """`self.name` and `getattr(self, "name")`."""
        for node in self.nodes:
            if (isinstance(node, ast.Attribute) and node.attr == name and _is_self(node.value)) or _literal(node) == name:
                yield node

    def _is_called(self, node: ast.AST) -> bool:
        parent = self.parents[node]
        return isinstance(parent, ast.Call) and parent.func is node

    def _is_tested(self, node: ast.AST) -> bool:
        """`if self.name:` or `self.name is not None`."""
        parent = self.parents[node]
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        return isinstance(parent, (ast.If, ast.IfExp)) and parent.test is node

    def _is_called_by_index(self, node: ast.AST) -> bool:
        parent = self.parents[node]
        return isinstance(parent, ast.Subscript) and not isinstance(parent.slice, ast.Slice) and self._is_called(parent)

    def _is_looped_over(self, node: ast.AST) -> bool:
        """`for element in self.name:`, or with enumerate, if the code only calls `element`."""
        loop, iterated = self.parents[node], node
        enumerated = isinstance(loop, ast.Call) and ast.unparse(loop.func) == "enumerate"
        if enumerated:
            loop, iterated = self.parents[loop], loop
        if not isinstance(loop, (ast.For, ast.comprehension)) or loop.iter is not iterated:
            return False
        target = loop.target
        if enumerated:
            target = target.elts[1] if isinstance(target, ast.Tuple) and len(target.elts) == 2 else ast.Tuple([])
        if not isinstance(target, ast.Name):
            return False
        uses = [n for n in self.nodes if isinstance(n, ast.Name) and n.id == target.id and isinstance(n.ctx, ast.Load)]
        return all(self._is_called(use) for use in uses)


def _name(node: ast.AST) -> str:
    """The name in `x.name`, `name` and `getattr(self, "name")`, "" for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else _literal(node) or ""


def _literal(node: ast.AST) -> str | None:
    """The name in `getattr(self, "name")`, None for anything else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1 and _is_self(node.args[0]):
        return str(node.args[1].value) if isinstance(node.args[1], ast.Constant) else None
    return None


def _holds_modules(value: Any) -> bool:
    """Whether an attribute that is no submodule leads to modules: a collection of them, or a method of one."""
    if isinstance(value, (list, tuple, set, dict)):
        return any(map(_holds_modules, value.values() if isinstance(value, dict) else value))
    return isinstance(getattr(value, "__self__", value), nn.Module)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
