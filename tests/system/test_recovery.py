"""A job one of whose ranks is killed goes on from its checkpoint, and ends where an undisturbed one ends."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support import ROOT
from support.processes import job, left_behind, outputs, two_ranks

pytestmark = [
    pytest.mark.world_size(1),
    # Not importorskip: each rank of every run collects this file, and the import takes a second.
    pytest.mark.skipif(find_spec("sklearn") is None, reason="the example trains on scikit-learn's digits"),
]
LIMIT = 100  # seconds, of a job

# Runs the example; in the first start a rank kills itself where the test says. An epoch has 28 steps.
JOB = f"""
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = checkpoints = 0
replace = os.replace
who = os.environ["TEST_KILLS"] if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else "nobody"

def step(*_):
    global steps
    steps += 1
    if who == "rank 1 in the middle of an epoch" and os.environ["RANK"] == "1" and steps == 40:
        os.kill(os.getpid(), signal.SIGKILL)

def replace_checkpoint(unfinished, path):
    global checkpoints
    checkpoints += 1
    if who == "rank 0 while it writes a checkpoint" and checkpoints == 2:
        os.truncate(unfinished, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(unfinished, path)

register_optimizer_step_post_hook(step)
os.replace = replace_checkpoint
runpy.run_path("{ROOT}/examples/recovery.py", run_name="__main__")
"""


def script_in(folder: Path) -> tuple[Path, list[str], Path]:
    """The job, its arguments, and where it keeps its checkpoint."""
    script, checkpoint = folder / "job.py", folder / "checkpoint.pt"
    script.write_text(JOB)
    return script, ["--epochs=3", "--batch-size=32", f"--checkpoint={checkpoint}"], checkpoint


def train(launcher: list[str], kills: str, folder: Path, env: dict[str, str]) -> tuple[str, dict]:
    """(output, last checkpoint) of a job of two ranks."""
    script, arguments, checkpoint = script_in(folder)
    env = env | {"RANKS": "2", "RESTARTS": "1", "PYTHONPATH": str(ROOT), "TEST_KILLS": kills}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [*launcher, str(script), *arguments]
    with job(env) as env:
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not left_behind(env)
    return done.stdout, torch.load(checkpoint, weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, forks, subprocess_env) -> dict:
    script, arguments, path = script_in(tmp_path_factory.mktemp("undisturbed"))
    ranks = [rank | {"TORCHELASTIC_RESTART_COUNT": "0", "TEST_KILLS": "nobody"} for rank in two_ranks()]
    ended = forks.run(script, *arguments, env=subprocess_env, timeout=LIMIT, ranks=ranks)
    assert all(rank.returncode == 0 and "resumes" not in rank.stdout for rank in ended), outputs(ended)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["epochs"] == 3
    return checkpoint


@pytest.mark.parametrize(
    ("kills", "launcher"),
    [
        ("rank 1 in the middle of an epoch", ["launch/torchrun.sh"]),
        ("rank 0 while it writes a checkpoint", ["torchrun", "--nproc-per-node=2", "--max-restarts=1"]),
    ],
)
def test_restarted_job_matches_an_uninterrupted_one(kills, launcher, undisturbed, tmp_path, subprocess_env):
    out, checkpoint = train(launcher, kills, tmp_path, subprocess_env)
    assert "resumes after epoch 1\n" in out, out
    assert checkpoint["epochs"] == 3
    assert checkpoint["model"].keys() == undisturbed["model"].keys()
    for name, want in undisturbed["model"].items():
        torch.testing.assert_close(checkpoint["model"][name], want, rtol=0, atol=1e-10, msg=name)
