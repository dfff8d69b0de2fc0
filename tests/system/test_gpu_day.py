"""launch/gpu_day.sh without a GPU: everything that its commands name exists, and what it does when a part fails or takes too long."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from support import ROOT
from support.processes import MARK, left_behind

pytestmark = pytest.mark.world_size(1)
SKIPPED = shutil.ignore_patterns("__pycache__", "*.so", ".*", "build", "out", "*.egg-info")


@pytest.fixture
def gpu_day(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    module = importlib.import_module("gpu_day")
    monkeypatch.setattr(module, "OUT", tmp_path)
    return module


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.mark.nightly
def test_every_command_of_the_day_could_run(tmp_path, subprocess_env):
    """In a copy of the repository, with stand-ins for what gpu_build.sh compiles."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=SKIPPED)
    command = ["bash", "launch/gpu_day.sh", "--dry-run"]

    def dry_run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=copy, env=subprocess_env | {"PYTHON": sys.executable}, capture_output=True, text=True)

    (copy / ".gpu").mkdir()
    for op in ("stats", "normalize", "backward_reduce", "backward_input"):
        program = copy / ".gpu" / f"sweep_{op}_now"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    (copy / "syncbn" / "libsyncbn_cuda.so").touch()
    done = dry_run()
    assert done.returncode == 0 and done.stdout.endswith("everything is there\n"), done.stdout + done.stderr
    limits = {number: int(seconds) for number, seconds in re.findall(r"^-- gpu_day.sh (\d): at most (\d+) s$", done.stdout, re.MULTILINE)}
    assert set(limits) == {"1", "2", "3"} and all(0 < limit <= 200 for limit in limits.values())
    counts = [int(count) for count in re.findall(r"\((\d+) tests\)$", done.stdout, re.MULTILINE)]
    assert len(counts) == 9 and max(counts) > 1000


STAND_INS = {  # for the compilers: what they are given is what they make
    "nvcc": 'while [ "$1" != -o ]; do words="$words $1"; shift; done; echo "echo $words" > "$2"; chmod +x "$2"',
    "python": 'mkdir -p build/gpu/syncbn; echo "$TORCH_CUDA_ARCH_LIST $*" > build/gpu/syncbn/libsyncbn_cuda.so',
}


@pytest.mark.skipif(not shutil.which("git"), reason="git is not on PATH")
def test_the_build_makes_a_library_and_a_sweep_of_each_op_and_revision(tmp_path, subprocess_env):
    copy, bin = tmp_path / "copy", tmp_path / "bin"
    shutil.copytree(ROOT, copy, ignore=SKIPPED)
    bin.mkdir()
    for name, script in STAND_INS.items():
        (bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin / name).chmod(0o755)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "-m", "before"]):
        subprocess.run(["git", *command], cwd=copy, check=True)
    env = subprocess_env | {"PATH": f"{bin}:{subprocess_env['PATH']}", "ARCH": "8.6", "PYTHON": "python"}

    def build(**variables: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
        done = subprocess.run(["bash", "launch/gpu_build.sh"], cwd=copy, env=env | variables, capture_output=True, text=True)
        return done, {path.name: path.read_text() for path in (copy / ".gpu").glob("*")}

    done, made = build(BEFORE="HEAD")
    ops = ("stats", "normalize", "backward_reduce", "backward_input")
    assert done.returncode == 0 and sorted(made) == sorted(f"sweep_{op}_{when}" for op in ops for when in ("now", "before")), done.stderr
    for name, words in made.items():
        op, _, when = name.removeprefix("sweep_").rpartition("_")
        assert f"-arch=sm_86 -Xptxas --warn-on-spills -I {'.' if when == 'now' else '.gpu/source'}/csrc/cuda -DSWEPT_OP={op} " in words
    assert (copy / "syncbn" / "libsyncbn_cuda.so").read_text().startswith("8.6 setup.py")

    done, made = build(BEFORE="")
    assert done.returncode == 0 and len(made) == len(ops) and "no sweep of the kernels before a change" in done.stdout
    done, _ = build(NVCC="no-such-compiler")
    assert done.returncode == 2 and "no-such-compiler is not on PATH" in done.stderr


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.mark.parametrize(
    ("command", "env", "problem"),
    [
        (
            ("python3", "-m", "pytest", "tests/kernels/test_gpu_kernels.py", "-k", "no_such_test"),
            {},
            "pytest collects no test for .*no_such_test",
        ),
        (("python3", "-m", "pytest", "tests/no_such_file.py"), {}, "pytest collects no test for tests/no_such_file.py"),
        ((sys.executable, "-m", "syncbn.check", "--no-such-option"), {}, "-m syncbn.check has no --no-such-option"),
        ((sys.executable, "-m", "syncbn.no_such_module"), {}, "No module named syncbn.no_such_module"),
        ((*TORCHRUN, sys.executable, "-m", "benchmarks.no_such_module"), {}, "No module named benchmarks.no_such_module"),
        ((*TORCHRUN, "--no-such-option", sys.executable, "-m", "syncbn.check"), {}, "-m torch.distributed.run has no --no-such-option"),
        ((".gpu/sweep_of_no_op",), {}, ".gpu/sweep_of_no_op is missing: run launch/gpu_build.sh"),
        (("launch/no_such_script.sh",), {}, "launch/no_such_script.sh is no program"),
        (("launch/sanitize.sh",), {"CASES": "repetition", "NO_SUCH": "1"}, "launch/sanitize.sh reads no NO_SUCH"),
    ],
)
def test_what_a_command_lacks_is_named(gpu_day, command, env, problem):
    part = gpu_day.Part("part", 1, (command,), 1, env=env)
    _, problems = gpu_day.check(part, command)
    assert len(problems) == 1 and re.search(problem, problems[0]), problems


def test_limits_that_add_up_to_more_than_the_time_there_is_are_a_problem(gpu_day, capsys):
    part = gpu_day.Part("part", 200, (("nvidia-smi",),), 1)
    assert gpu_day.dry_run({"1": (330, [(part,), (part, part)])}) == 1  # two at once count once
    assert "the limits of 1 add up to 400 s, more than 330" in capsys.readouterr().out


def test_nothing_runs_after_a_failed_check(gpu_day, tmp_path, capsys):
    check = gpu_day.Part("check", 60, (python("print('wrong'); raise SystemExit(1)"),), 2, vital=True)
    after = gpu_day.Part("after", 60, (python("print('ran')"),), 2)
    assert gpu_day.run_groups([(check,), (after,)]) == 1
    assert "== check has failed" in capsys.readouterr().out
    assert (tmp_path / "check.txt").read_text() == "wrong\n" and not (tmp_path / "after.txt").exists()


def test_a_part_that_is_not_vital_fails_alone(gpu_day, capsys):
    parts = [
        gpu_day.Part("silent", 60, (python("print('skipped')"),), 2, requires=" passed"),
        gpu_day.Part("missing", 60, (("/no/such/program",), python("print('second')")), 2),
        gpu_day.Part("good", 60, (python("print('3 passed')"),), 2, requires=" passed"),
    ]
    assert gpu_day.run_groups([(part,) for part in parts]) == 1
    lines = capsys.readouterr().out.partition("-- summary")[2].splitlines()
    assert re.match(r"== silent: FAILED, no line of its output has ' passed', \d+ s", lines[1]) and lines[2] == "skipped"
    assert "== missing: FAILED" in lines[3] and "/no/such/program" in lines[3] and lines[4] == "second"
    assert re.match(r"== good: ok, \d+ s", lines[5]) and lines[6] == "3 passed"


def test_at_its_limit_a_part_ends_with_all_its_processes(gpu_day, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '100'])"
    slow = gpu_day.Part("slow", 2, (python(code), python("print('next')")), 3)
    assert gpu_day.run_groups([(slow,)]) == 1
    assert "== slow: FAILED, stopped at its limit of 2 s" in capsys.readouterr().out
    assert (tmp_path / "slow.txt").read_text() == "begun\n"
    assert left_behind({MARK: str(tmp_path)}) == []


def test_parts_of_a_group_run_side_by_side(gpu_day, tmp_path):
    meet = "import pathlib, time; pathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a.met"), str(tmp_path / "b.met")
    group = (gpu_day.Part("a", 60, (python(meet.format(a, b)),), 1), gpu_day.Part("b", 60, (python(meet.format(b, a)),), 1))
    assert gpu_day.run_groups([group]) == 0


def test_at_its_limit_a_launcher_can_end_its_ranks(gpu_day, tmp_path, monkeypatch):
    """torchrun's are in sessions of their own, where no signal to the launcher's session reaches them."""
    monkeypatch.setenv(MARK, str(tmp_path))
    code = (
        "import signal, subprocess; rank = subprocess.Popen(['sleep', '100'], start_new_session=True); "
        "signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), rank.wait(), exit(1))); print('begun', flush=True); rank.wait()"
    )
    assert gpu_day.run_groups([(gpu_day.Part("launcher", 2, (python(code),), 1),)]) == 1
    assert (tmp_path / "launcher.txt").read_text() == "begun\n" and left_behind({MARK: str(tmp_path)}) == []


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_the_summary_has_at_most_60_lines_and_every_part_one_file(gpu_day, number, tmp_path, capsys):
    """However much the parts print, and all of it worth showing."""
    shown = ["# best", "│ °C after, peer memory", "cuda compiled kernels", "written", "1 passed, 1 failed"]
    shown += ["exchange in each other's GPU memory"]
    talkative = python(f"for _ in range(1000):\n  for line in {shown!r}: print(line + 300 * '.')")
    groups = [tuple(replace(part, commands=(talkative,)) for part in group) for group in gpu_day.RUNS[number][1]]
    parts = [part for group in groups for part in group]
    assert gpu_day.run_groups(groups) == 0
    lines = capsys.readouterr().out.partition("-- summary")[2].splitlines()
    assert len(parts) < len(lines) <= 60 and max(map(len, lines)) <= 170
    assert {path.name for path in tmp_path.iterdir()} == {f"{part.name}.txt" for part in parts} and len(parts) <= 8
