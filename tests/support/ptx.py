"""PTX, what nvcc makes of a kernel, as C++ for the emulation: line by line, so that every message names a line of the PTX.

An instruction becomes a call of the function of its name in kernels/ptx, a register a variable or an element of an array, and a kernel
a function of the addresses of its parameters. Unknown instructions fail to compile.
"""

from __future__ import annotations

import re

REGISTERS = {"pred": "bool", "b16": "u16", "b32": "u32", "b64": "u64", "f32": "u32", "f64": "u64"}
SIZES = {"b8": 1, "u8": 1}
TYPE = re.compile(r"[usfb]\d+|bf16|pred")
# These take a source location, because they can diverge or access a bad address.
TELLS_WHERE = ("bar", "shfl", "ld", "st", "atom")


def translate(text: str, name: str) -> str:
    """The PTX in a file of this name, as a file of C++."""
    text = re.sub(r"//.*", "", text)
    body = "\n".join(map(_line, text.splitlines()))
    kernels = re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", text, re.DOTALL)
    defined = [f'static const Defined defined_{n}("{kernel}", {kernel}, {threads});' for n, (kernel, threads) in enumerate(kernels)]
    return "\n".join(['#include "ptx.h"', "using namespace ptx;", f'#line 1 "{name}"', body, *defined, ""])


def _line(line: str) -> str:
    line = line.strip()
    for pattern, replacement in LINES:
        if found := re.fullmatch(pattern, line):
            return replacement(*found.groups()) if callable(replacement) else found.expand(replacement)
    return line


def _instruction(unless: str | None, predicate: str | None, mnemonic: str, operands: str) -> str:
    parts = [part for part in mnemonic.split(".") if part not in ("v2", "v4", "uni")]
    if parts == ["ret"]:
        call = "return"
    elif parts == ["bra"]:
        call = f"goto {operands}"
    else:
        types = [part for part in parts if TYPE.fullmatch(part)]
        function = "".join(f"{part}_" for part in parts if part not in types) + (f"<{', '.join(types)}>" if types else "")
        where = ["EMULATION_SITE"] if parts[0] in TELLS_WHERE else []
        call = f"{function}({', '.join(where + ([_operands(operands)] if operands else []))})"
    return f"if ({unless}{_operands(predicate)}) {call};" if predicate else f"{call};"


def _operands(text: str) -> str:
    for pattern, replacement in OPERANDS:
        text = re.sub(pattern, replacement, text)
    return text


INSTRUCTION = r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s*([^;]*);"
LINES = [
    (r"\.(?:version|target|address_size|maxntid|minnctapersm|pragma|param) .*|\)", ""),
    (r"(?:\.visible )?\.entry (\w+)\(", r"static void \1(const u64* param)"),
    (r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", lambda t, name, count: f"{REGISTERS[t]} {name}[{count}]; poison({name});"),
    (r"\.reg \.(\w+)\s+%(\w+);", lambda t, name: f"{REGISTERS[t]} {name};"),  # in a block of one or two instructions
    (r"\.extern \.shared .* ([\w$]+)\[\];", r"static const u32 \1 = 0;"),
    (
        r"\.shared \.align \d+ \.(\w+) ([\w$]+)(?:\[(\d+)\])?;",
        lambda t, name, count: f'static const u32 {name} = shared_variable("{name}", {SIZES[t] * int(count or 1)});',
    ),
    (r"([\w$]+):", r"\1:;"),
    (r"\{\s*" + INSTRUCTION + r"\s*\}", _instruction),  # the form in which nvcc writes inline assembly
    (INSTRUCTION, _instruction),
]
OPERANDS = [
    (r"\[([\w$%]+)(?:\+(-?\d+))?\]", lambda found: f"at({found[1]}, {found[2] or 0})"),
    (r"\{([^}]*)\}", r"vector(\1)"),
    (r"\|", ", "),
    (r"\b0f([0-9A-F]{8})\b", r"0x\1u"),
    (r"\b0d([0-9A-F]{16})\b", r"0x\1ul"),
    (r"%(n?tid|n?ctaid)\.x", r"\1_x()"),
    (r"%([a-z]+)(\d+)", r"\1[\2]"),
    (r"%", ""),
    (r"\w+_param_(\d+)\b", r"param[\1]"),
]
