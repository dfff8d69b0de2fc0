"""MPI's own law: the memory of a request belongs to MPI until the request has completed, whatever ends the wait for it."""

from __future__ import annotations

import signal
import time

import pytest
import torch

import syncbn
from syncbn import environment
from syncbn.comm.failures import Incomplete

pytestmark = pytest.mark.world_size(2, 3)


class Interrupted(Exception):
    """Raised by a signal handler, as Ctrl-C raises KeyboardInterrupt."""


def interrupt(*_) -> None:
    raise Interrupted


@pytest.mark.parametrize("ended_by", ["signal", "timeout"])
def test_whatever_ends_a_wait_leaves_request_and_buffer_to_mpi(world, ended_by, monkeypatch):
    if world.group is None:
        pytest.skip("this run is not over MPI")
    from syncbn.comm import mpi

    comm = syncbn.comm.resolve(world.group)
    comm.all_reduce_(torch.ones(3, dtype=torch.float64))  # makes the duplicate
    before = set(mpi._in_flight)
    total = torch.ones(50_000, dtype=torch.float64)  # too long for a message that is copied at once
    if world.rank == 0:
        if ended_by == "timeout":
            monkeypatch.setattr(environment, "settings", environment.settings._replace(mpi_timeout=0.3))
        else:
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Incomplete if ended_by == "timeout" else Interrupted):
            comm.all_reduce_(total)
        (abandoned,) = mpi._in_flight - before
        address = total.data_ptr()
        del total
        others = [torch.zeros(50_000, dtype=torch.float64) for _ in range(5)]
        assert all(t.data_ptr() != address for t in others), "MPI still writes there"
        deadline = time.monotonic() + 20
        while not abandoned.request.Test() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert abandoned.buffer.sum() == 50_000 * world.size and not any(t.any() for t in others)
        mpi._in_flight.discard(abandoned)
    else:
        time.sleep(1)
        assert comm.all_reduce_(total)[0] == world.size
    assert set(mpi._in_flight) == before
    assert comm.all_reduce_(torch.ones(3, dtype=torch.float64)).sum() == 3 * world.size, "the ranks are in step again"
