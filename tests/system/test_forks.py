"""The helper that forks the ranks of other tests: its processes are as if Python had been started with the script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.forks import fork_server
from support.processes import job, marked, two_ranks

pytestmark = [
    pytest.mark.world_size(1),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc"),
]
SCRIPT = """
import atexit, os, signal, sys
print(sys.argv, sys.path[:2], os.getcwd(), __name__, __file__, "syncbn" in sys.modules)
print(sorted((name, value) for name, value in os.environ.items() if name != "SYNCBN_TEST_JOB"))
print(sys.stdin.read(), os.get_inheritable(0), file=sys.stderr)
atexit.register(print, "the end")
"""
ENDS = {
    "returns": "",
    "exits": "sys.exit(3)",
    "exits with a message": "sys.exit('a message')",
    "raises": "raise ValueError('a reason')",
    "is killed": "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)",
    "becomes another program": "sys.stdout.flush(); os.execv('/bin/sh', ['sh', '-c', 'echo $OTHER; exit 4'])",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_is_like_a_process(end, forks, subprocess_env, tmp_path, monkeypatch):
    script, env = tmp_path / "job.py", subprocess_env | {"OTHER": "2", "PYTHONPATH": str(tmp_path / "more")}
    script.write_text(SCRIPT + ENDS[end])
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(script), "a", "b c"]
    want = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    (got,) = forks.run(script, "a", "b c", env=env, timeout=100)
    assert (got.returncode, got.stdout) == (want.returncode, want.stdout)
    assert got.stderr.splitlines()[-1:] == want.stderr.splitlines()[-1:]


def test_each_fork_has_the_variables_of_its_rank(forks, subprocess_env, tmp_path):
    script = tmp_path / "job.py"
    script.write_text("import ctypes, os; print(os.environ['RANK']); ctypes.CDLL(None).system(b'echo $LOCAL_RANK')")
    ended = forks.run(script, env=subprocess_env, timeout=100, ranks=two_ranks())
    assert [sorted(rank.stdout.split()) for rank in ended] == [["0", "0"], ["1", "1"]]


def test_a_job_kills_its_forks(forks, subprocess_env, tmp_path):
    script = tmp_path / "job.py"
    script.write_text("import time; time.sleep(600)")
    with open(os.devnull, "w") as null, job(subprocess_env) as other:
        there = forks.start(script, env=other, stdout=null, stderr=null)
        with job(subprocess_env) as env:
            first, second = (forks.start(script, env=env, stdout=null, stderr=null) for _ in range(2))
            with pytest.raises(subprocess.TimeoutExpired):
                first.wait(0.1)
            assert sorted(marked(env)) == sorted([first.pid, second.pid])
        assert [first.wait(10), second.wait(10)] == [-9, -9]
        assert marked(env) == [] and marked(other) == [there.pid]


def test_a_server_that_hangs_is_an_error(subprocess_env, tmp_path):
    """And the end of the test run does not wait for it. A fork's parent is a child of the server."""
    stop, other = tmp_path / "stop.py", tmp_path / "other.py"
    stop.write_text("""
import os, signal
from pathlib import Path
def stat(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
server = int(stat(os.getppid())[1])
os.kill(server, signal.SIGSTOP)
while stat(server)[0] != "T":  # on a busy machine it stops later
    pass
""")
    other.write_text("")
    with fork_server(subprocess_env) as forks:
        (stopped,) = forks.run(stop, env=subprocess_env, timeout=100)
        assert stopped.returncode == 0, stopped.stderr
        with pytest.raises(subprocess.TimeoutExpired, match="the start of other.py"):
            forks.run(other, env=subprocess_env, timeout=0.1)


def test_no_fork_outlives_a_test_run_that_ends_hard(subprocess_env, tmp_path):
    """A launcher that reads the run's output would wait until the fork ends."""
    script, run = tmp_path / "job.py", tmp_path / "run.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    run.write_text(f"""
import os, sys
from pathlib import Path
from support.forks import fork_server
from support.processes import job
with job(dict(os.environ)) as env, fork_server(env) as forks:
    forks.start(Path({str(script)!r}), env=env, stdout=sys.stdout, stderr=sys.stderr)
    os._exit(3)
""")
    env = subprocess_env | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run([sys.executable, str(run)], env=env, capture_output=True, timeout=100).returncode == 3
