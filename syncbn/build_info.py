"""What a compiled library was built for, read in its file before it is loaded: loading a damaged one would end the process.

csrc/bindings/build_info.cpp puts the text `schemas=...;cuda=13000;archs=75 80;` into a section of its own. setup.py runs this file
without torch.
"""

from __future__ import annotations

import hashlib
import platform
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

SECTION = b"syncbn_build"
# What `platform.machine()` says, and the number of it in a library's header.
MACHINES = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183, "ppc64le": 21, "riscv64": 243}
LOADED, STRING_TABLE = 1, 3  # types of a segment and of a section


class Unusable(Exception):
    """The library must not be loaded: the reason, without the library's name."""


def digest(schemas: Mapping[str, str]) -> str:
    """Of the ops' schemas: a library that implements others would fail, or compute something else."""
    return hashlib.sha256(repr(sorted(schemas.items())).encode()).hexdigest()[:12]


def read(path: Path) -> dict[str, str]:
    """The values that csrc/bindings/build_info.cpp wrote, by name; none if it wrote nothing. Raises Unusable."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            text = _section(file, _header(file, size), size)
    except OSError as error:
        raise Unusable(f"cannot be read ({error})") from None
    except struct.error:
        raise Unusable("is damaged") from None
    return dict(part.split("=", 1) for part in text.rstrip(b"\0").decode(errors="replace").split(";") if "=" in part)


class _Header(NamedTuple):
    """Where a library's tables are, of 64 bits and the least significant byte first."""

    machine: int
    segments_at: int
    sections_at: int
    segment_size: int
    segments: int
    section_size: int
    sections: int
    names: int  # the index of the section that has the sections' names


def _read(file: BinaryIO, layout: str, offset: int) -> tuple[int, ...]:
    file.seek(offset)
    return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))


def _header(file: BinaryIO, size: int) -> _Header:
    """Raises Unusable if the file is no library, one for another kind of processor, or shorter than its header says."""
    if size < 64 or _read(file, "4s", 0) != (b"\x7fELF",):
        raise Unusable(f"is no library, or not a whole one: it has {size:,} bytes")
    kind = _read(file, "BB", 4)
    header = _Header(*_read(file, "18xH12xQQ6xHHHHH", 0))
    here = platform.machine().lower()
    if kind != (2, 1) or header.machine != MACHINES.get(here, header.machine):
        names = {number: name for name, number in reversed(MACHINES.items())}
        raise Unusable(f"is for {names.get(header.machine, 'another kind of processor')}, this machine is {here}")
    # The linker writes the table of sections last: it is the mark of the file's end.
    ends = [header.sections_at + header.sections * header.section_size]
    for i in range(header.segments):
        kind_of_segment, offset, bytes_in_file = _read(file, "I4xQ16xQ", header.segments_at + i * header.segment_size)
        if kind_of_segment == LOADED:
            ends.append(offset + bytes_in_file)
    if max(ends) > size:
        raise Unusable(f"is not whole: it has {size:,} of {max(ends):,} bytes")
    return header


def _section(file: BinaryIO, header: _Header, size: int) -> bytes:
    """The content of SECTION; empty if there is none."""
    # Of each section: the place of its name, type, offset, size.
    sections = [_read(file, "II16xQQ", header.sections_at + i * header.section_size) for i in range(header.sections)]
    if not sections:
        return b""
    _, kind, names_at, _ = sections[min(header.names, len(sections) - 1)]
    if kind != STRING_TABLE:
        raise Unusable("is damaged: its last part is not what a linker writes")
    for name_at, _, offset, length in sections:
        file.seek(names_at + name_at)
        if file.read(len(SECTION) + 1) == SECTION + b"\0":
            file.seek(offset)
            return file.read(min(length, size))
    return b""
