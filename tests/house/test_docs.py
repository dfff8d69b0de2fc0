"""The documents are true: every block of Python in README.md and docs/ runs or says why not, commands name what exists,
and relative links lead somewhere.

A block runs in this process, and always, unless a comment before it says otherwise:

    <!-- run: torchrun -->           on two ranks, as a script, with torchrun's variables
    <!-- run: mpirun -->             on two ranks, as a script
    <!-- run: with lightning -->     if that package is installed
    <!-- not run: the reason -->
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import syncbn
from support import ROOT
from support.processes import run, two_ranks

pytestmark = pytest.mark.world_size(1)

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
# The names that blocks take for granted.
PREAMBLE = """
import copy
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import syncbn
torch.manual_seed(0)
C = 8
model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU())
x = torch.randn(2, 3, 8, 8)
loader = [x.clone() for _ in range(3)]
"""


class Block(NamedTuple):
    page: Path
    line: int
    mark: str  # "", "run: ..." or "not run: ..."
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text()
    for match in re.finditer(r"(?:<!-- ((?:not )?run: .*?) -->\n)?^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        found.append(Block(page, line, match[1] or "", match[2], match[3]))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
JOBS = [block for block in PYTHON if block.mark in ("run: torchrun", "run: mpirun")]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]


@pytest.mark.parametrize("block", JOBS, ids=lambda block: block.name)
def test_a_block_runs_on_two_ranks(block, forks, subprocess_env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(PREAMBLE + block.code)
    env = subprocess_env | {"PYTHONPATH": str(ROOT)}
    if block.mark == "run: mpirun":
        pytest.importorskip("mpi4py")
        if not shutil.which("mpirun"):
            pytest.skip("mpirun is not on PATH")
        ended = [run(["mpirun", "-n", "2", sys.executable, "-m", "mpi4py", str(script)], env=env, timeout=110)]
    else:
        ended = forks.run(script, env=env, timeout=110, ranks=two_ranks())
    assert all(done.returncode == 0 for done in ended), "".join(done.stderr[-3000:] for done in ended)


@pytest.mark.parametrize("block", [block for block in PYTHON if block not in JOBS], ids=lambda block: block.name)
def test_a_block_runs(block, tmp_path, monkeypatch):
    kind, _, value = block.mark.partition(": ")
    if kind == "not run":
        pytest.skip(value)
    monkeypatch.chdir(tmp_path)
    if value:
        pytest.importorskip(value.removeprefix("with "))
    names: dict[str, object] = {"__name__": "block"}
    exec(compile(PREAMBLE + block.code, block.name, "exec"), names)


def test_marks_are_known():
    marks = [block.mark for block in PYTHON if block.mark]
    assert {"run: torchrun", "run: mpirun"} <= set(marks)
    assert [mark for mark in marks if not re.fullmatch(r"run: (torchrun|mpirun|with \w+)|not run: .+", mark)] == []
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(re.findall(r"<!-- (?:not )?run: ", text)) == len(marks), "a mark belongs to a block of Python, on the line before it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_escapes_these_tests(page):
    """Each is in a language that they know, or is the output of a program, and begins a line."""
    fences = re.findall(r"^[ >]*(?:```|~~~).*$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0 and set(fences[1::2]) <= {"```"}
    assert set(fences[::2]) <= {"```python", "```bash", "```text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page):
    """Commands are in blocks, and in code between words."""
    text = page.read_text()
    code = "\n".join([*(block.code for block in COMMANDS if block.page == page), *re.findall(r"`([^`\n]+)`", text)])
    files = re.findall(r"(?<![\w/.-])((?:launch|examples|\.ci|benchmarks|tests)/[\w/.]+)", code)
    assert [name for name in files if not (ROOT / name).exists()] == []
    modules = re.findall(r"-m ((?:syncbn|benchmarks)[\w.]*)", code)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "RELEASE.md", "tests/README.md"))], ids=lambda page: page.name
)
def test_relative_links_lead_to_files(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("name", syncbn.__all__)
def test_every_public_name_is_documented(name):
    """On the API page, after its module's name if a module has the same name; and in the README, the guide or troubleshooting."""
    api = (ROOT / "docs/api.md").read_text()
    assert re.search(rf"^::: syncbn\.(\w+\.)?{name}$", api, re.MULTILINE)
    told = "".join((ROOT / page).read_text() for page in ("README.md", "docs/guide.md", "docs/troubleshooting.md"))
    assert re.search(rf"\b{name}\b", told) or name.startswith("SyncBatchNorm")


def messages() -> str:
    """All texts in the sources, with an ellipsis for each value that is filled in."""
    texts = []
    for path in [ROOT / "setup.py", *sorted((ROOT / "syncbn").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return " ".join("\n".join(texts).split())


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    sections = (ROOT / "docs/troubleshooting.md").read_text().split("| message | cause | cure |\n|---|---|---|\n")[1:]
    rows = [line.split(" | ") for section in sections for line in section.partition("\n\n")[0].splitlines()]
    assert len(rows) > 25 and [row for row in rows if len(row) != 3 or not all(cell.strip("| ") for cell in row)] == []
    told = [row[0].strip("| ") for row in rows if not row[0].endswith(("(from torch)", "(NCCL)"))]
    parts = [part.strip(" :,") for message in told for part in message.split("…") if part.strip(" :,")]
    known = messages()
    assert [part for part in parts if part not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_named_on_the_pages_exist(page):
    """If a file is named with a test, the test is in that file."""
    tests = {path.name: set(re.findall(r"def (test_\w+)", path.read_text())) for path in (ROOT / "tests").rglob("test_*.py")}
    everywhere = set.union(*tests.values())
    named = re.findall(r"(test_\w+\.py)?(?:::)?(test_\w+(?!\w|\.py))?", page.read_text())
    missing = [(file, name) for file, name in named if (file and file not in tests) or (name and name not in tests.get(file, everywhere))]
    assert missing == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "csrc/README.md", "tests/README.md"])
def test_files_named_in_the_maps_exist(page):
    """A page names them by the end of their path, or by their path from the repository or from the page."""
    names = re.findall(r"`([\w/.]+\.(?:py|md|h|cpp|cu|cuh)|[\w/]+/)`", (ROOT / page).read_text())
    folders = ("syncbn", "csrc", "tests", "docs", "benchmarks")
    paths = "\n".join(f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.*")) + "\n"
    assert len(names) > 20
    unknown = [
        name for name in names if f"/{name}\n" not in paths and not any((folder / name).exists() for folder in (ROOT, (ROOT / page).parent))
    ]
    assert [name for name in unknown if "NAME" not in name] == []
