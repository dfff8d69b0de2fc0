"""Ten thousand steps: nothing grows, and the ranks stay together to the last bit."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import syncbn

pytestmark = [
    pytest.mark.world_size(2),
    pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc"),
]
WARM_UP, STEPS = 2_000, 10_000
# Memory and objects: above normal fluctuation, and below what one more tensor in each step would add.
ALLOWED = {
    "resident bytes": 64 * STEPS,
    "bytes of malloc": 8 * STEPS,
    "objects of Python": STEPS // 20,
    "threads": 0,
    "file descriptors": 0,
}


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def usage() -> dict[str, int]:
    """What this process holds now."""
    gc.collect()
    process = Path("/proc/self")
    held = {
        "resident bytes": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "objects of Python": sys.getallocatedblocks(),
        "threads": len(list((process / "task").iterdir())),
        "file descriptors": len(list((process / "fd").iterdir())),
    }
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc's
    if mallinfo is not None:
        mallinfo.restype = Mallinfo
        info = mallinfo()
        held["bytes of malloc"] = info.uordblks + info.hblkhd
    return held


def train(world, time_limit, *when: int) -> list[torch.Tensor]:
    """The moving statistics after each of these numbers of steps. The batches are unequal."""
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, momentum=0.01)
    numbers = torch.Generator().manual_seed(world.rank)
    statistics = []
    for step in range(1, when[-1] + 1):
        x = torch.randn(2 + world.rank, 3, 4, generator=numbers, requires_grad=True)
        layer.zero_grad()
        layer(x).square().sum().backward()
        if step % 2_000 == 0:
            time_limit()  # again, for each part: if ranks share busy cores, a step waits for several turns
        if step in when:
            statistics.append(torch.cat([layer.running_mean, layer.running_var, layer.num_batches_tracked[None]]))
    return statistics


class Runs(NamedTuple):
    """A short run, and a long one that passes through the same state."""

    short: torch.Tensor  # the moving statistics after WARM_UP steps
    passed: torch.Tensor  # those of the long run after as many
    end: torch.Tensor  # those after STEPS
    grown: dict[str, int]  # by how much each usage is greater after the long run than before


@pytest.fixture(scope="module")
def finished() -> list[Runs]:
    return []


@pytest.fixture
def runs(world, time_limit, finished) -> Runs:
    """Made once, for all tests of this file."""
    if not finished:
        (short,) = train(world, time_limit, WARM_UP)
        before = usage()
        passed, end = train(world, time_limit, WARM_UP, STEPS)
        after = usage()
        finished.append(Runs(short, passed, end, {what: after[what] - n for what, n in before.items()}))
    return finished[0]


def test_long_run_does_not_leak(runs):
    print(runs.grown)
    assert {what: n for what, n in runs.grown.items() if n > ALLOWED[what]} == {}


def test_long_run_is_reproducible(world, runs):
    """Bitwise, on every rank and every time."""
    assert runs.passed.tolist() == runs.short.tolist() != runs.end.tolist()
    for other in world.all_gather(runs.end):
        assert other.tolist() == runs.end.tolist()
