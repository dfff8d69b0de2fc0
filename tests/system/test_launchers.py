"""launch/torchrun.sh and mpirun.sh run the same example, and the synchronized run follows the one-process run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support import ROOT
from support.processes import outputs, run, two_ranks

pytestmark = [
    pytest.mark.world_size(1),
    # Not importorskip: each rank of every run collects this file, and the import takes a second.
    pytest.mark.skipif(find_spec("sklearn") is None, reason="the example trains on scikit-learn's digits"),
]


EXAMPLES = ROOT / "examples"


def output(command: list[str], env: dict[str, str]) -> str:
    done = run(command, env=env, cwd=ROOT, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, forks, subprocess_env) -> Path:
    """The result of a single process with the whole batch."""
    out = tmp_path_factory.mktemp("segmentation")
    arguments = ["--norm", "local", "--batch-size", "8", "--steps", "3", "--out", str(out)]
    (done,) = forks.run(EXAMPLES / "segmentation.py", *arguments, env=subprocess_env, timeout=110)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def compare(one_process, tmp_path, forks, subprocess_env) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Runs compare.py on the result of the test and that of the single process."""

    def run_it() -> subprocess.CompletedProcess[str]:
        results = [*tmp_path.glob("*.pt"), *one_process.glob("*.pt")]
        arguments = [*map(str, results), "--plot", str(tmp_path / "plot.png")]
        (done,) = forks.run(EXAMPLES / "compare.py", *arguments, env=subprocess_env, timeout=110)
        return done

    return run_it


def assert_agrees(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert "2 x 4" in done.stdout and (folder / "plot.png").stat().st_size > 10_000


def example(norm: str, folder: Path) -> list[str]:
    return [str(EXAMPLES / "segmentation.py"), "--norm", norm, "--batch-size", "4", "--steps", "3", "--out", str(folder)]


@pytest.mark.parametrize("launcher", ["torchrun.sh", "mpirun.sh"])
def test_the_synchronized_example_follows_the_one_process_run(launcher, compare, tmp_path, subprocess_env):
    output([f"launch/{launcher}", *example("sync", tmp_path)], subprocess_env | {"RANKS": "2", "PYTHON": sys.executable})
    assert_agrees(compare(), tmp_path)


def test_the_unsynchronized_example_does_not_follow_the_one_process_run(compare, tmp_path, forks, subprocess_env):
    """Without a launcher: its ranks only meet to gather their results."""
    script, *arguments = example("local", tmp_path)
    ended = forks.run(Path(script), *arguments, env=subprocess_env, timeout=110, ranks=two_ranks())
    assert [rank.returncode for rank in ended] == [0, 0], outputs(ended)
    assert_agrees(compare(), tmp_path)
    (result,) = tmp_path.glob("*.pt")
    torch.save({**torch.load(result), "norm": "sync"}, result)  # the comparison can fail: call the run synchronized
    done = compare()
    assert done.returncode == 1 and "does not follow" in done.stdout


def test_a_synchronized_run_that_is_no_better_fails_the_comparison(compare, one_process, tmp_path):
    """It follows the single process, but its intersection over union is only 0.1 above that of the unsynchronized run."""
    (whole,) = one_process.glob("*.pt")
    result = {**torch.load(whole), "ranks": 2, "batch_size": 4}
    torch.save({**result, "norm": "sync"}, tmp_path / "sync.pt")
    torch.save({**result, "norm": "local", "iou": result["iou"] - 0.3}, tmp_path / "local.pt")
    assert_agrees(compare(), tmp_path)
    torch.save({**result, "norm": "local", "iou": result["iou"] - 0.1}, tmp_path / "local.pt")
    done = compare()
    assert done.returncode == 1 and "does not beat the one per rank" in done.stdout and "does not follow" not in done.stdout


def test_mpirun_runs_plain_torch_scripts(tmp_path, subprocess_env):
    (tmp_path / "train.py").write_text(
        "import torch.distributed as dist, torch, sys\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.ones(1); dist.all_reduce(x)\n"
        "print('sum', int(x), 'arguments', sys.argv[1:])\n"
        "dist.destroy_process_group()\n"
    )
    env = subprocess_env | {"RANKS": "2", "PYTHON": sys.executable}
    out = output(["launch/mpirun.sh", str(tmp_path / "train.py"), "--lr", "0.1"], env)
    assert "sum 2" in out and "['--lr', '0.1']" in out
    module = [sys.executable, "-W", "error", "-m", "syncbn.environment", "-m", "train", "--lr", "0.2"]
    done = run(["mpirun", "-n", "2", *module], env=subprocess_env, cwd=tmp_path, timeout=110)
    assert done.returncode == 0 and "sum 2" in done.stdout and "['--lr', '0.2']" in done.stdout, done.stderr


def test_environment_leaves_a_safe_path_as_it_is(tmp_path, subprocess_env):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/of_the_user.py").touch()
    (tmp_path / "train.py").write_text("import of_the_user")
    path = {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{tmp_path / 'modules'}:{ROOT}"}
    done = run([sys.executable, "-m", "syncbn.environment", str(tmp_path / "train.py")], env=subprocess_env | path, timeout=110)
    assert done.returncode == 0, done.stderr


def test_environment_without_a_script_prints_its_usage(tmp_path, forks, subprocess_env):
    script = tmp_path / "job.py"
    script.write_text("import runpy; runpy.run_module('syncbn.environment', run_name='__main__', alter_sys=True)")
    for arguments in ([], ["-m"], ["--help"]):
        (done,) = forks.run(script, *arguments, env=subprocess_env, timeout=110)
        assert done.returncode == 1 and "mpirun -n 4 python -m syncbn.environment train.py" in done.stderr


@pytest.mark.parametrize("script", sorted(ROOT.glob("launch/*.sh")) + [ROOT / "launch/slurm.sbatch"], ids=lambda path: path.name)
def test_the_launchers_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
