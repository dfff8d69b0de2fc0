"""The examples run, small."""

from __future__ import annotations

import sys

import pytest

from support import ROOT
from support.processes import run, two_ranks

pytestmark = pytest.mark.world_size(1)
EXAMPLES = ROOT / "examples"


@pytest.fixture
def output(forks, subprocess_env, tmp_path, monkeypatch):
    """The output of the first rank of an example, which runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str, ranks=({},)) -> str:
        ended = forks.run(EXAMPLES / name, *arguments, env=subprocess_env | {"PYTHONPATH": str(ROOT)}, timeout=110, ranks=ranks)
        assert all(done.returncode == 0 for done in ended), "".join(done.stderr[-3000:] for done in ended)
        return ended[0].stdout

    return run_example


def test_horovod_script_is_python():
    """Horovod cannot be installed beside a current torch: the script is documentation."""
    path = EXAMPLES / "horovod_migration" / "train_horovod.py"
    compile(path.read_text(), str(path), "exec")


def test_torchrun_port_learns(output):
    pytest.importorskip("sklearn")
    out = output("horovod_migration/train_torchrun.py", ranks=two_ranks())
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("epoch")]
    assert len(losses) == 3 and losses[-1] < 0.3  # 2.3 is guessing


def test_the_example_of_moving_statistics_draws_its_plot(output, tmp_path):
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    output("moving_statistics.py", "--steps=6", "--out=plot.png", ranks=two_ranks())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_of_folding_prints_its_table(output):
    for module in ("rich", "tqdm"):
        pytest.importorskip(module)
    out = output("fold.py", "--width=8", "--depth=2", "--image=8", "--repeats=2")
    assert "before" in out and "after" in out and "largest difference" in out


def test_ray_trains_workers_with_identical_statistics(subprocess_env, tmp_path):
    pytest.importorskip("ray.train.torch", reason="needs ray[train]")
    env = subprocess_env | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    done = run([sys.executable, str(EXAMPLES / "ray_train.py")], env=env, cwd=tmp_path, timeout=350)  # ray starts some twenty processes
    assert done.returncode == 0 and "moving statistics of 2 workers are identical: True" in done.stdout + done.stderr, done.stderr[-3000:]
