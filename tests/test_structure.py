"""Imports go one way: modules -> function -> ops -> reference, with comm beside ops. Nothing heavy is imported unasked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn

pytestmark = pytest.mark.world_size(1)
PACKAGE = Path(syncbn.__file__).parent
# From the bottom up; what one line lists may import only what stands above it.
LAYERS = [
    {"layout", "native", "comm", "comm.process_group", "comm.mpi", "environment"},
    {"reference", "groups", "keras_weights"},
    {"ops"},
    {"function"},
    {"modules"},
    {"fuse", "keras"},
    {"convert", "fold", "statistics"},
    {"__init__"},
]


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports at its top level, as names in LAYERS."""
    found = set()
    package = path.parent.relative_to(PACKAGE).parts
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = list(package)[: len(package) - node.level + 1]
            if node.module:
                found.add(".".join([*base, node.module]))
            else:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_go_one_way(path):
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    name = module_name(path)
    assert name in level, f"{name} has no place in the order of modules"
    for imported in imports_of(path):
        same_package = imported.split(".")[0] == name.split(".")[0]
        assert level[imported] < level[name] or same_package, f"{name} imports {imported}"


def test_importing_the_package_imports_no_optional_dependency():
    optional = ("mpi4py", "tqdm", "matplotlib", "sklearn", "lightning")  # torch imports tqdm itself where it is installed
    code = f"import sys, torch; torchs = set(sys.modules); import syncbn; print([m for m in {optional} if m in set(sys.modules) - torchs])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
