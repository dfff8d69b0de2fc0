"""Ten thousand steps: nothing grows, and the ranks stay together to the last bit."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest
import torch

import syncbn

pytestmark = [
    pytest.mark.world_size(2),
    pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc"),
]
STEPS = 10_000
# For each: far above what comes and goes, far below one small object a step.
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


def train(world) -> torch.Tensor:
    """The moving statistics after ten thousand steps with unequal batches."""
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, momentum=0.01)
    numbers = torch.Generator().manual_seed(world.rank)
    for _ in range(STEPS):
        x = torch.randn(2 + world.rank, 3, 4, generator=numbers, requires_grad=True)
        layer.zero_grad()
        layer(x).square().sum().backward()
    return torch.cat([layer.running_mean, layer.running_var, layer.num_batches_tracked[None]])


def test_ten_thousand_steps_leave_nothing_and_end_in_the_same_bits_everywhere_and_every_time(world):
    first = train(world)
    before = usage()
    again = train(world)
    after = usage()
    print({what: after[what] - n for what, n in before.items()})
    assert {what: after[what] - n for what, n in before.items() if after[what] - n > ALLOWED[what]} == {}
    for other in [again, *world.all_gather(first)]:
        assert other.tolist() == first.tolist()
