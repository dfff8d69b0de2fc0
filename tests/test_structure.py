"""Imports go one way: a module imports only what stands before it in ORDER. Nothing heavy is imported unasked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn

pytestmark = pytest.mark.world_size(1)
PACKAGE = Path(syncbn.__file__).parent
ORDER = [
    "layout",
    "native",
    "comm.process_group",
    "comm.mpi",
    "comm.recorded",
    "comm",
    "environment",
    "reference",
    "groups",
    "agreement",
    "exchange",
    "checkpoint",
    "ops",
    "double_backward",
    "function",
    "keras_weights",
    "modules",
    "keras",
    "fuse",
    "convert",
    "statistics",
    "fold",
    "join",
    "lightning",
    "check",
    "__init__",
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
    name = module_name(path)
    assert name in ORDER, f"{name} has no place in the order of modules"
    for imported in imports_of(path):
        assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_importing_the_package_imports_no_optional_dependency():
    code = "import sys, torch; before = set(sys.modules); import syncbn; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()}
    assert "syncbn" in packages
    assert not packages & {"mpi4py", "tqdm", "matplotlib", "sklearn", "lightning", "pytest"}
