"""Tests import helpers from support/ and nothing else of tests/. No file of the repository but data is over 300 lines."""

from __future__ import annotations

import ast
import subprocess

import pytest

from support import ROOT

pytestmark = pytest.mark.world_size(1)
TESTS = ROOT / "tests"
SOURCES = sorted(TESTS.rglob("*.py"))
IN_TESTS = {path.stem for path in SOURCES} - {"__init__"}
MAX_LINES = 300
# Files that programs read or draw.
DATA = (".csv", ".json", ".png", ".svg")


def imported_names(source: str) -> set[str]:
    """Every dotted part of every import, those inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_of_the_tests_imports_a_test(path):
    tests = {name for name in IN_TESTS if name.startswith("test_")} | {"conftest"}
    assert not imported_names(path.read_text()) & tests


def test_module_names_are_unique():
    """pytest imports test files by name alone, because the wings are no packages."""
    names = [path.name for path in SOURCES if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))


def test_no_file_is_over_300_lines():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git repository")
    paths = [ROOT / name for name in listed.stdout.splitlines() if not name.endswith(DATA)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths if path.exists()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
