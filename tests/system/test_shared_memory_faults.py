"""A rank that is killed, stopped, leaves or raises, at each point of the exchange in shared memory: the other one hears of it."""

from __future__ import annotations

import os
import re
import tempfile

import pytest

from support.processes import job
from support.shared_memory import WHY_NOT
from syncbn.comm import shared_memory

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(shared_memory.library() is None, reason=WHY_NOT)]
TIMEOUT = 4  # seconds
LIMIT = 60

# Two ranks that meet through files. Rank 1 has an accident while it sets up, or in its third exchange.
SCRIPT = f"""
import os, signal, sys, time, torch
from pathlib import Path
from syncbn.comm import meeting, shared_memory, signatures
folder, rank, fault = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
meeting.FOLDER = Path(sys.argv[4])
rounds = 0
def gather(row):
    global rounds
    rounds += 1
    (folder / f"part {{rounds}} {{rank}}").write_bytes(row)
    (folder / f"part {{rounds}} {{rank}}").rename(folder / f"{{rounds}} {{rank}}")
    if rank == 1 and fault == f"killed in round {{rounds}} of the set-up":
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    while not all((folder / f"{{rounds}} {{r}}").exists() for r in range(2)):
        time.sleep(0.001)
        if time.monotonic() > began + {TIMEOUT}:
            raise TimeoutError("set-up")
    return [(folder / f"{{rounds}} {{r}}").read_bytes() for r in range(2)]
def exchange(n, timeout={TIMEOUT}):
    return memory.all_reduce_(torch.ones(20000).double(), signatures.digest_of(f"exchange {{n}}"), timeout)[0].item()
def publish(n):  # and return before the other rank, which is late, has come
    values, digest = torch.ones(20000).double(), signatures.digest_of(f"exchange {{n}}")
    assert memory._all_reduce(memory._address, 1, values.data_ptr(), 20000, 0, digest) == shared_memory._WAITING
began = time.time()
try:
    memory = meeting.meet(gather, rank, 2).memory
    memory.create(by_segments="segments" in fault) if rank == 0 else None
    gather(b"ready")
    exchange(1), exchange(2)
    if rank == 0 and "published" in fault:
        time.sleep(0.5)
    if rank == 1:
        if "published" in fault:
            publish(3)
        if "killed" in fault:
            os.kill(os.getpid(), signal.SIGKILL)
        if "stopped" in fault:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "ends" in fault:
            sys.exit()
        if "raises" in fault:
            raise ValueError("its own")
        if "leaves" in fault:
            time.sleep(3 * {TIMEOUT})
            sys.exit()
    began = time.time()
    exchange(3)
    exchange(4)
except Exception as error:
    (folder / f"{{rank}}.error").write_text(f"{{type(error).__name__}} after {{time.time() - began:.2f}} s: {{error}}")
    raise
"""
ENDED = r"SharedExchangeError after ([\d.]+) s: rank 1: the process has ended"
LATE = r"SharedExchangeError after ([\d.]+) s: rank 1: not there yet, but alive"
FAULTS = {  # of rank 1: (rank 0's error, its latest time in seconds)
    "killed before it has published": (ENDED, 1),
    "killed after it has published": (ENDED, 1),
    "killed after it has published, by segments": (ENDED, 1),
    "ends before it has published": (ENDED, 1),
    "raises before it has published": (ENDED, 1),
    "raises after it has published": (ENDED, 1),
    "stopped before it has published": (LATE, TIMEOUT + 2),
    "stopped after it has published": (LATE, TIMEOUT + 2),
    "leaves before it has published": (LATE, TIMEOUT + 2),
    **{f"killed in round {n} of the set-up": (r"TimeoutError after ([\d.]+) s: set-up", TIMEOUT + 30) for n in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_rank_1_is_an_error_on_rank_0(fault, tmp_path, subprocess_env, forks):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    words, latest = FAULTS[fault]
    with (
        tempfile.TemporaryDirectory(prefix="syncbn-test-", dir="/dev/shm") as folder,  # in which other jobs' files come and go
        job(subprocess_env) as env,
        open(os.devnull, "w") as null,
    ):
        first, _second = (forks.start(script, str(tmp_path), rank, fault, folder, env=env, stdout=null, stderr=null) for rank in "01")
        assert first.wait(LIMIT) == 1
        left = os.listdir(folder)
    said = (tmp_path / "0.error").read_text()
    match = re.match(words, said)
    assert match, said
    assert float(match.group(1)) < latest, said
    assert not left
