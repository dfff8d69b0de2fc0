"""The ranks of a group agree on memory that those of a host share, or on the reason why they do not use any.

    gather hosts' identities ──► first rank of each makes a file ──► gather names ──► all map theirs ──► gather random numbers
    ──► all compare ──► gather the verdicts

Each step that gathers is one exchange over the group itself. It also carries any rank's reason to give up: all ranks go on, or none.
A file has a name only until all ranks have mapped theirs.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from .. import environment, native
from .shared_memory import SharedMemory, bytes_for, library

FOLDER = Path("/dev/shm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
VERSION = b"1"  # of the protocol: ranks may run different builds
PAYLOAD, REASON = 64, 192  # bytes in a row of `gather`
# Seconds. An older file is taken for that of a killed job, and removed. If that job is only slow, its ranks exchange over their group.
STALE = 60
Gather = Callable[[bytes], list[bytes]]
Made = TypeVar("Made")


class Unusable(Exception):
    """Why the ranks do not share memory. The same words on every rank."""


class Hosts(NamedTuple):
    """The hosts of a group's ranks, and the memory on this rank's host: None if no other rank is there."""

    ranks: list[list[int]]  # those of each host; the hosts in the order of their first ranks
    memory: SharedMemory | None


def meet(gather: Gather, rank: int, world_size: int) -> Hosts:
    """Every rank calls it. Raises Unusable on every rank if one of them cannot share memory, or if no two are on one host.

    Args:
        gather: takes this rank's bytes, PAYLOAD + REASON of them, and returns those of every rank.
    """
    why = _why_not()
    identity, why = (None, why) if why else _try(host_identity)
    identities = agree(gather, identity or b"", why)
    hosts = list({host: [r for r in range(world_size) if identities[r] == host] for host in identities}.values())
    if len(hosts) == world_size:
        raise Unusable("each rank is on a host, or in a container, of its own")
    here = next(ranks for ranks in hosts if rank in ranks)
    path: Path | None = None
    memory: SharedMemory | None = None
    try:
        why = ""
        if rank == here[0] and len(here) > 1:
            path = FOLDER / f"syncbn-{secrets.token_hex(16)}"
            memory, why = _try(_create, path, here)
        names = agree(gather, path.name.encode() if path and not why else b"", why)
        path = FOLDER / names[here[0]].rstrip(b"\0").decode()
        if len(here) > 1 and memory is None:
            memory, why = _try(_map, path, here, rank)
        random = secrets.randbits(63) + 1
        if memory is not None:
            memory.join(random)
        randoms = agree(gather, random.to_bytes(8, "little"), why)
        if memory is not None and memory.randoms() != [int.from_bytes(randoms[r][:8], "little") for r in here]:
            why = f"{FOLDER} of the ranks {here} is not the same memory"
        agree(gather, b"", why)
    finally:  # all ranks of the host have mapped the file, or no more will; each removes the file's name, in case its maker was killed
        if path is not None and len(here) > 1:
            with suppress(OSError):  # another rank has removed it; or another user made it, and this one may not remove it
                path.unlink()
    if memory is not None:
        memory.start()
    return Hosts(hosts, memory)


def agree(gather: Gather, payload: bytes, reason: str) -> list[bytes]:
    """The payload of each rank. Raises Unusable on every rank if one has a reason."""
    rows = gather(payload.ljust(PAYLOAD, b"\0") + reason.encode()[:REASON].ljust(REASON, b"\0"))
    reasons: dict[str, list[str]] = {}
    for rank, row in enumerate(rows):
        if text := row[PAYLOAD:].rstrip(b"\0").decode(errors="replace"):
            reasons.setdefault(text, []).append(str(rank))
    if reasons:
        raise Unusable(
            "; ".join(text if len(ranks) == len(rows) else f"rank {', '.join(ranks)}: {text}" for text, ranks in reasons.items())
        )
    return [row[:PAYLOAD] for row in rows]


def _why_not() -> str:
    if not environment.settings.shared_memory:
        return "turned off by SYNCBN_SHARED_MEMORY=0"
    if not native.status()[0].loaded:
        return f"the compiled library is not loaded: {native.status()[0].reason}"
    if library() is None:
        return "the compiled library was built without it: shared memory needs Linux, and a library of this version"
    return "" if FOLDER.is_dir() else f"there is no {FOLDER}"


def host_identity() -> bytes:
    """Equal for ranks that may share memory: the same protocol, boot of the machine, host name, and file system in FOLDER.

    Containers of one machine have their own host names or their own /dev/shm.
    """
    try:
        boot = BOOT_ID.read_bytes()
    except OSError as error:  # as in some sandboxes
        raise ValueError(f"this host cannot be told from others: {BOOT_ID}: {error.strerror}") from error
    parts = VERSION, boot, socket.gethostname().encode(), str(FOLDER.stat().st_dev).encode()
    return hashlib.sha256(b"\0".join(parts)).digest()


def _try(make: Callable[..., Made], *arguments: object) -> tuple[Made | None, str]:
    """What `make` returns, or the reason why it has failed."""
    try:
        return make(*arguments), ""
    except (OSError, ValueError) as error:
        return None, f"{FOLDER}: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def _create(path: Path, ranks: list[int]) -> SharedMemory:
    _remove_stale()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, bytes_for(len(ranks)))  # an error now, instead of SIGBUS at the first page that does not fit
        memory = SharedMemory(file, 0, _names(ranks))
    except BaseException:
        os.close(file)
        path.unlink()
        raise
    memory.create()
    return memory


def _map(path: Path, ranks: list[int], rank: int) -> SharedMemory:
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size != bytes_for(len(ranks)):
            raise ValueError(f"{FOLDER}: the first rank's file has another size")
        return SharedMemory(file, ranks.index(rank), _names(ranks))
    except BaseException:
        os.close(file)
        raise


def _names(ranks: list[int]) -> list[str]:
    return [f"rank {rank}" for rank in ranks]


def _remove_stale() -> None:
    """Removes files of this user's jobs whose ranks were all killed in the milliseconds between making the name and removing it."""
    for path in FOLDER.glob("syncbn-*"):
        with suppress(OSError):
            status = path.lstat()
            if re.fullmatch(r"syncbn-[0-9a-f]{32}", path.name) and status.st_uid == os.getuid() and status.st_mtime < time.time() - STALE:
                path.unlink()
