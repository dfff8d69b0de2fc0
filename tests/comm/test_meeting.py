"""How ranks agree on memory: all give one rank's problem as the reason why there is none, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.shared_memory import TIMEOUT, WHY_NOT, gather, set_up
from syncbn import environment
from syncbn.comm import meeting, shared_memory
from syncbn.comm.meeting import Unusable, meet
from syncbn.comm.signatures import digest_of as digest

pytestmark = [pytest.mark.world_size(2, 3, 4), pytest.mark.skipif(shared_memory.library() is None, reason=WHY_NOT)]


@pytest.fixture(autouse=True)
def folder(world) -> Iterator[Path]:
    """A folder for these ranks alone, in /dev/shm, where other jobs' files come and go."""
    name = gather(world, secrets.token_hex(16).encode())[0].decode()
    path = Path("/dev/shm") / f"syncbn-test-{name}"
    path.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "FOLDER", path)
        gather(world, b"all have made it")
        yield path
    gather(world, b"all have left it")
    shutil.rmtree(path, ignore_errors=True)  # another rank may have been faster


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("syncbn-*")}


def refuses(*_, **__):
    raise OSError(28, "No space left on device")


def belongs_to_another_user(patch: pytest.MonkeyPatch) -> None:
    """The first rank's file: in /dev/shm a user can neither open nor remove another user's."""

    def denies(*_, **__):
        raise PermissionError(13, "Permission denied")

    patch.setattr(os, "open", denies)
    patch.setattr(Path, "unlink", denies)


TURNED_OFF = environment.read_settings({"SYNCBN_SHARED_MEMORY": "0"})
PROBLEMS = {  # on one rank, or on every rank: (how to make it, the reason)
    "turned off": (lambda patch: patch.setattr(environment, "settings", TURNED_OFF), "turned off by SYNCBN_SHARED_MEMORY=0"),
    "no library": (lambda patch: patch.setattr(meeting, "library", lambda: None), "built without it"),
    "no folder": (lambda patch: patch.setattr(meeting, "FOLDER", Path("/dev/none")), "there is no /dev/none"),
    "a read-only folder": (lambda patch: patch.setattr(meeting, "FOLDER", Path("/proc")), ""),
    "a full folder": (lambda patch: patch.setattr(os, "posix_fallocate", refuses), "No space left"),
    "an unknown host": (lambda patch: patch.setattr(meeting, "BOOT_ID", Path("/proc/none")), "cannot be told from others: /proc/none"),
    "another user": (belongs_to_another_user, "{folder}: Permission denied"),
    "no mapping": (lambda patch: patch.setattr(shared_memory.mmap, "mmap", refuses), "No space left"),
}


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on one rank"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_the_same_reason_on_every_rank(world, folder, name, everywhere, monkeypatch):
    make, reason = PROBLEMS[name]
    before, descriptors = files(folder), len(os.listdir("/proc/self/fd"))
    one = 0 if name == "a full folder" else world.size - 1  # rank 0 makes the file
    if everywhere or world.rank == one:
        make(monkeypatch)
    try:
        meet(lambda row: gather(world, row), world.rank, world.size)
        said = ""
    except Unusable as error:
        said = str(error)
    monkeypatch.undo()
    assert reason.format(folder=folder) in said
    assert len(set(gather(world, said.encode().ljust(400)))) == 1
    if name == "a read-only folder" and not everywhere and world.size > 2:
        assert not said  # that rank is as if on another host
    else:
        assert said
    gather(world, b"all have given up")
    after = files(folder)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    gather(world, b"all have looked")
    assert after == before


def test_two_hundred_groups_leave_no_file_no_mapping_and_no_descriptor(world, folder):
    if world.size > 2:
        pytest.skip("two ranks are enough for 800 collectives of gloo, which take long")

    def resources() -> tuple[int, int, set[str]]:
        gc.collect()
        mappings = Path("/proc/self/maps").read_text().count("syncbn-")
        return len(os.listdir("/proc/self/fd")), mappings, files(folder)

    set_up(world)
    gather(world, b"set up")
    before = resources()
    for _ in range(200):
        memory = set_up(world)
        memory.all_reduce_(torch.ones(3).double(), digest("a"), TIMEOUT)
    del memory
    gather(world, b"done")
    after = resources()
    gather(world, b"all have looked")
    assert after == before


def test_a_name_that_a_killed_job_has_left_is_removed(world, folder):
    """A young one may belong to ranks that are about to map the file."""
    stale, young = (folder / f"syncbn-{number:032x}" for number in range(2))
    if world.rank == 0:
        stale.touch()
        young.touch()
        os.utime(stale, (time.time() - 3600,) * 2)
    gather(world, b"left")
    set_up(world)
    assert young.exists() and not stale.exists()
