"""The examples run, small."""

from __future__ import annotations

import sys

import pytest

from support import ROOT
from support.processes import run, torchrun

pytestmark = pytest.mark.world_size(1)
EXAMPLES = ROOT / "examples"


def output(command, env, cwd):
    done = run([str(part) for part in command], env=env | {"PYTHONPATH": str(ROOT)}, cwd=cwd, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_horovod_script_is_python():
    """Horovod cannot be installed beside a current torch: the script is documentation."""
    path = EXAMPLES / "horovod_migration" / "train_horovod.py"
    compile(path.read_text(), str(path), "exec")


def test_torchrun_port_learns(subprocess_env, tmp_path):
    pytest.importorskip("sklearn")
    script = EXAMPLES / "horovod_migration" / "train_torchrun.py"
    out = output([*torchrun(), script], subprocess_env, tmp_path)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("epoch")]
    assert len(losses) == 3 and losses[-1] < 0.3  # 2.3 is guessing


def test_the_example_of_moving_statistics_draws_its_plot(subprocess_env, tmp_path):
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    output([*torchrun(), EXAMPLES / "moving_statistics.py", "--steps=12", "--out=plot.png"], subprocess_env, tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_of_folding_prints_its_table(subprocess_env, tmp_path):
    for module in ("rich", "tqdm"):
        pytest.importorskip(module)
    out = output([sys.executable, EXAMPLES / "fold.py", "--width=8", "--depth=2", "--image=8", "--repeats=2"], subprocess_env, tmp_path)
    assert "before" in out and "after" in out and "largest difference" in out


def test_ray_trains_workers_with_identical_statistics(subprocess_env, tmp_path, time_limit):
    pytest.importorskip("ray.train.torch", reason="needs ray[train]")
    time_limit(400)  # ray starts some twenty processes
    env = subprocess_env | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    done = run([sys.executable, str(EXAMPLES / "ray_train.py")], env=env, cwd=tmp_path, timeout=350)
    assert done.returncode == 0 and "moving statistics of 2 workers are identical: True" in done.stdout + done.stderr, done.stderr[-3000:]
