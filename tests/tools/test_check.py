"""`python -m syncbn.check` reports the installation, and fails if a layer is wrong."""

from __future__ import annotations

import json
import sys

import pytest

from support.processes import outputs, run, torchrun, two_ranks

pytestmark = pytest.mark.world_size(1)
LAUNCHERS = {
    "no launcher": [sys.executable],
    "torchrun": torchrun(),
    "mpirun": ["mpirun", "-n", "2", sys.executable],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_correct_layer_passes(launcher, subprocess_env):
    command = [*LAUNCHERS[launcher], "-m", "syncbn.check", "--json"]
    done = run(command, env=subprocess_env, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["ranks"]["world_size"] == (1 if launcher == "no launcher" else 2)
    assert report["ranks"]["launcher"] == {"no launcher": None, "torchrun": "torchrun", "mpirun": "MPICH"}[launcher]
    assert set(report["errors"]) == {"float64", "float32", "float16", "bfloat16"} and set(report["implementations"]) == {"cpu", "cuda"}
    assert report["errors"]["float64"] < 1e-10
    assert (report["ms_per_collective"] > 0) == (launcher != "no launcher")
    assert report["exchange_path"] == ("none: a single rank" if launcher == "no launcher" else "in shared memory")


def test_a_wrong_layer_fails(tmp_path, forks, subprocess_env):
    """Two ranks find a layer that does not synchronize."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, syncbn.modules as m; from syncbn.comm import LOCAL; m.resolve = lambda group: LOCAL\n"
        "from syncbn.check import main; sys.exit(main([]))"
    )
    ended = forks.run(script, env=subprocess_env, timeout=100, ranks=two_ranks())
    assert [rank.returncode for rank in ended] == [1, 1], outputs(ended)
    assert "WRONG" in ended[0].stdout


def test_problems_come_with_a_remedy(subprocess_env):
    env = {name: value for name, value in subprocess_env.items() if name != "OMP_NUM_THREADS"} | {"SYNCBN_NATIVE": "0"}
    done = run([*LAUNCHERS["mpirun"], "-m", "syncbn.check"], env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "problem: cpu runs the slower reference: turned off by SYNCBN_NATIVE=0." in done.stdout
    assert "problem: OMP_NUM_THREADS is not set" in done.stdout
    assert "exchange over the group: the compiled library is not loaded: turned off by SYNCBN_NATIVE=0; median" in done.stdout
    assert "a layer on these ranks matches a single process" in done.stdout
