"""What ends tests that take too long, and their jobs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid

import pytest

from support import ROOT
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


def test_a_test_that_takes_too_long_ends_with_its_stacks(tmp_path, subprocess_env):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_slow.py").write_text("""
import time
def test_slow(time_limit):
    time_limit(0.1)
    time.sleep(100)
""")
    env = subprocess_env | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended = run([sys.executable, "-m", "pytest", "-c", "/dev/null", str(tmp_path)], env=env, timeout=100, cwd=tmp_path)
    assert ended.returncode == 1 and 'test_slow.py", line 5 in test_slow' in ended.stderr, ended
