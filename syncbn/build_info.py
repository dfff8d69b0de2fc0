"""What a compiled library was built for, read from its file before it is loaded: loading a damaged library can end the process.

csrc/bindings/build_info.cpp puts the text `schemas=...;cuda=13000;archs=75 80;` into a section of its own. The file's format is ELF,
of 64 bits and little-endian (man 5 elf). setup.py runs this module without torch.
"""

from __future__ import annotations

import hashlib
import platform
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

SECTION = b"syncbn_build"
# The names that `platform.machine()` returns, and ELF's number for each (e_machine).
MACHINES = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183, "ppc64le": 21, "riscv64": 243}
LOADED, STRING_TABLE = 1, 3  # the types PT_LOAD of a segment and SHT_STRTAB of a section


class Unusable(Exception):
    """The library must not be loaded. The message is the reason, and follows the library's name in a sentence."""


def digest(schemas: Mapping[str, str]) -> str:
    """12 hexadecimal digits that stand for the ops' schemas. A library built from other schemas would fail, or compute something else."""
    return hashlib.sha256(repr(sorted(schemas.items())).encode()).hexdigest()[:12]


def read(path: Path) -> dict[str, str]:
    """The values that csrc/bindings/build_info.cpp wrote, by name: `schemas`, and of a library for CUDA `cuda` and `archs`.

    Empty if the file has no such section.

    Raises:
        Unusable: the file cannot be read, is damaged or cut short, or is for another kind of processor.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            text = _section(file, _header(file, size), size)
    except OSError as error:
        raise Unusable(f"cannot be read ({error})") from None
    except (struct.error, ValueError):  # ValueError: an offset that no file can have
        raise Unusable("is damaged") from None
    return dict(part.split("=", 1) for part in text.rstrip(b"\0").decode(errors="replace").split(";") if "=" in part)


class _Header(NamedTuple):
    """The fields of ELF's header (Elf64_Ehdr) that are needed: offsets and sizes in bytes, and how many segments and sections there are."""

    machine: int
    segments_at: int
    sections_at: int
    segment_size: int
    segments: int
    section_size: int
    sections: int
    names: int  # the index of the section that contains the sections' names


def _read(file: BinaryIO, layout: str, offset: int) -> tuple[int, ...]:
    file.seek(offset)
    return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))


def _header(file: BinaryIO, size: int) -> _Header:
    """The header of a file of `size` bytes.

    Raises:
        Unusable: the file is no library, is one for another kind of processor, or is shorter than its header says.
    """
    if size < 64 or _read(file, "4s", 0) != (b"\x7fELF",):
        raise Unusable(f"is no library, or not a whole one: it has {size:,} bytes")
    kind = _read(file, "BB", 4)
    header = _Header(*_read(file, "18xH12xQQ6xHHHHH", 0))
    here = platform.machine().lower()
    if kind != (2, 1) or header.machine != MACHINES.get(here, header.machine):
        names = {number: name for name, number in reversed(MACHINES.items())}
        raise Unusable(f"is for {names.get(header.machine, 'another kind of processor')}, this machine is {here}")
    # The linker writes the table of sections last, so a file that was cut short ends before it.
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
    # Of each section: the offset of its name in the table of names, its type, offset and size.
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
