"""The helper that ends the jobs of other tests."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest

from support.processes import MARK, kill, marked, run

pytestmark = [
    pytest.mark.world_size(1),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc"),
]


def test_a_job_that_takes_too_long_leaves_no_process_behind(tmp_path, subprocess_env):
    """Its launcher, a child, and one in a session of its own that ignores what a launcher would send."""
    script = f"echo -n ${MARK} > mark; (trap '' TERM; exec setsid sleep 600) & sleep 600 & wait"
    with pytest.raises(subprocess.TimeoutExpired):
        run(["bash", "-c", script], env=subprocess_env, timeout=1, cwd=tmp_path)
    mark = (tmp_path / "mark").read_text()
    assert mark and marked({MARK: mark}) == []


def test_a_process_belongs_to_a_job_only_if_the_whole_mark_is_its_own(subprocess_env):
    env = {**subprocess_env, MARK: uuid.uuid4().hex}
    others = [{**env, MARK: env[MARK] + "0"}, {**env, MARK: "", "OTHER": f"{MARK}={env[MARK]}"}]
    started = [subprocess.Popen(["sleep", "60"], env=variables) for variables in (env, *others)]
    try:
        assert marked(env) == [started[0].pid]
        kill(env)
        assert [process.poll() is None for process in started] == [False, True, True]
    finally:
        for process in started:
            process.kill()
            process.wait()
