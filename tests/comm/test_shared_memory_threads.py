"""The exchange in shared memory under sanitizers, with threads as ranks. Its mutants must be noticed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support import ROOT

pytestmark = pytest.mark.world_size(1)
SOURCE = ROOT / "csrc/cpu/shared_memory.cpp"
CASES = [  # ranks, by segments, exchanges
    (2, 0, 300),
    (3, 0, 150),
    (3, 1, 150),
    (9, 1, 20),  # more ranks than ALL_READ_ALL of syncbn/comm/shared_memory.py
]
MUTANTS = {  # (text of the source, its replacement)
    "the epoch before the values": (
        "      piece.write(values, slot.values);\n      self.stage = published;\n      publish(self);\n",
        "      self.stage = published;\n      publish(self);\n      piece.write(values, slot.values);\n",
    ),
    "one slot": ("2 * rank + epoch % 2", "2 * rank"),
    "an epoch read without acquiring": (
        "control.epoch.load(std::memory_order_acquire) >= epoch",
        "control.epoch.load(std::memory_order_relaxed) >= epoch",
    ),
    "cores that do not follow the cpuset": ("!CPU_EQUAL(&given, &all)", "true"),
    "cores beyond those of a pinned rank": ("!CPU_EQUAL(&given, &all)", "false"),
    "no comparison": ("slot.digest != self.digest", "false"),
    "results copied before all have added": (
        "    const Status status = wait(m, rank);",
        "    const Status status = self.stage == summed ? done : wait(m, rank);",
    ),
}


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    path = shutil.which("g++") or shutil.which("clang++")
    if path is None:
        pytest.skip("no C++ compiler is on PATH")
    return [path, "-std=c++17", "-O1", "-g"]


def build(compiler: list[str], source: Path, folder: Path, sanitizer: str = "thread") -> Path:
    program = folder / "threads"
    threads = ROOT / "tests/comm/shared_memory_threads.cpp"
    command = [*compiler, f"-fsanitize={sanitizer}", source, threads, "-o", program, "-lpthread"]
    made = subprocess.run(command, capture_output=True, text=True)
    if f"lib{sanitizer[0]}san" in made.stderr:
        pytest.skip(f"no sanitizer here: {made.stderr.splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    return program


def run(program: Path, case: tuple[int, int, int], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, case)], capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_nothing_races_or_leaves_its_memory_and_every_sum_is_right(sanitizer, compiler, tmp_path):
    program = build(compiler, SOURCE, tmp_path, sanitizer)
    for case in CASES:
        done = run(program, case)
        assert (done.returncode, done.stdout) == (0, "ok\n"), f"{case}: {done.stderr[:3000]}"


def fails(program: Path, case: tuple[int, int, int]) -> bool:
    """A mutant may also leave all ranks waiting."""
    try:
        return run(program, case, timeout=30).returncode != 0
    except subprocess.TimeoutExpired:
        return True


@pytest.mark.nightly
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, compiler, tmp_path):
    text, replacement = MUTANTS[name]
    sources = {path.name: path.read_text() for path in SOURCE.parent.glob("shared_memory*")}
    assert sum(source.count(text) for source in sources.values()) == 1
    cpu = tmp_path / "cpu"
    cpu.mkdir()
    shutil.copy(SOURCE.parent.parent / "args.h", tmp_path)
    for file, source in sources.items():
        (cpu / file).write_text(source.replace(text, replacement))
    program = build(compiler, cpu / SOURCE.name, tmp_path)
    assert any(fails(program, case) for case in CASES[:3])
