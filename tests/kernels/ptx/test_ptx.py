"""The CUDA kernels as nvcc compiles them: their PTX, run on the CPU, against the float64 reference."""

from __future__ import annotations

import ctypes
import re
from math import inf, nan

import pytest
import torch

from support import emulated
from support.mutants import run_all_checks
from support.op_cases import table
from support.op_checks import CHECKS

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.world_size(1),
    pytest.mark.skipif(not (emulated.COMPILER and emulated.NVCC), reason="g++ and nvcc are not both on PATH"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulated.build_from_ptx(tmp_path_factory.mktemp("ptx"))


@pytest.mark.parametrize("case", table(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_equals_the_reference(kernels, op, case):
    CHECKS[op](kernels.varied(op, case), case)


@pytest.mark.parametrize("op", emulated.OPS)
def test_unmodified_kernels_pass(library, op):
    run_all_checks(library, op)


@pytest.mark.parametrize(
    ("op", "old", "new", "message"),
    [
        ("stats", r"bar\.sync\s+0;", "", r"^stats: \d+ of \d+ differ"),
        ("stats", r"mov\.f64\s+%\w+, 0d0000000000000000;", "", r"^stats: \d+ of \d+ differ"),
        ("normalize", r"(fma\.rn\.f32\s+%\w+, )(%\w+, )", r"\1 0f3F800000, ", r"^y: \d+ of \d+ differ"),
        ("backward_reduce", r"shfl\.sync(\S+\s+\S+, \S+, )\S+,", r"shfl.sync\1 1,", r"^sums: \d+ of \d+ differ"),
        ("backward_reduce", r"(st\.shared\.\S+\s+\[%\w+)(\+\d+)?\]", r"\1+65536]", r"out of bounds of shared memory: \S+ptx:\d+"),
        ("backward_input", r"(ld\.global\.v4\.\S+\s+{[^}]*}, \[%\w+)\]", r"\1+4]", r"misaligned: \S+ptx:\d+"),
    ],
    ids=["barriers", "first values", "factors", "lanes", "bounds", "alignment"],
)
def test_ptx_mutant_is_killed(library, tmp_path, op, old, new, message):
    text = (library.parent / f"{op}.ptx").read_text()
    changed = re.sub(old, new, text)
    assert changed != text
    emulated.compile_translated(changed, op, tmp_path / "mutant.o", "-O0")
    with pytest.raises((AssertionError, RuntimeError), match=message):
        run_all_checks(emulated.link(library.parent, {f"{op}_ptx": tmp_path / "mutant.o"}), op)


# Instructions on which the kernels' results hardly depend: each row leaves its result in %rd0.
INSTRUCTIONS = [
    ("fma.rm.f32 %f0, 0fBF800001, 0f3F800001, 0f00000000; mov.b64 %rd0, {%f0, 0};", torch.float32, -(1 + 3 * 2**-23)),  # nearest: 2, not 3
    ("fma.rn.f32 %f0, 0f3F800800, 0f3F800800, 0fBF801000; mov.b64 %rd0, {%f0, 0};", torch.float32, 2**-24),  # unfused: 0
    ("cvt.sat.f32.f32 %f0, 0f7FC00000; mov.b64 %rd0, {%f0, 0};", torch.float32, 0),  # of NaN
    ("cvt.sat.f32.f32 %f0, 0f40000000; mov.b64 %rd0, {%f0, 0};", torch.float32, 1),
    ("rcp.rn.f64 %rd0, 0d8000000000000000;", torch.float64, -inf),
    ("sqrt.rn.f64 %rd0, 0dBFF0000000000000;", torch.float64, nan),
    ("cvt.rn.bf16.f32 %rs0, 0f3F808000; cvt.u64.u16 %rd0, %rs0;", torch.int64, 0x3F80),  # a tie, to even
    ("cvt.rn.bf16.f32 %rs0, 0f3F818000; cvt.u64.u16 %rd0, %rs0;", torch.int64, 0x3F82),
    ("cvt.rn.f16.f32 %rs0, 0f3F803000; cvt.u64.u16 %rd0, %rs0;", torch.int64, 0x3C02),
    ("shr.s32 %r0, -8, 1; cvt.s64.s32 %rd0, %r0;", torch.int64, -4),
    ("shr.u32 %r0, -8, 1; cvt.s64.s32 %rd0, %r0;", torch.int64, 2**31 - 4),
    ("shr.s64 %rd0, -8, 70;", torch.int64, -1),
    ("shl.b32 %r0, 1, 32; cvt.u64.u32 %rd0, %r0;", torch.int64, 0),
    ("mul.wide.s32 %rd0, -2, 3;", torch.int64, -6),
    ("mul.wide.u16 %r0, 65535, 65535; cvt.u64.u32 %rd0, %r0;", torch.int64, 65535**2),
    ("cvt.s64.s32 %rd0, -5;", torch.int64, -5),
    ("mov.u32 %r0, -5; cvt.u64.u32 %rd0, %r0;", torch.int64, 2**32 - 5),
    ("bfi.b32 %r0, 3, 255, 4, 2; cvt.u64.u32 %rd0, %r0;", torch.int64, 0xFF),
    ("bfi.b32 %r0, 0, 255, 4, 2; cvt.u64.u32 %rd0, %r0;", torch.int64, 0xCF),
    *(
        (f"setp.{comparison}.f32 %p0, 0f7FC00000, 0f3F800000; selp.b64 %rd0, 1, 0, %p0;", torch.int64, comparison[-1:] == "u")
        for comparison in ("eq", "ne", "lt", "le", "gt", "ge", "neu", "ltu", "leu", "gtu", "geu")
    ),
]


def test_instructions_are_right_at_their_edge_cases(library, tmp_path):
    registers = [".reg .pred %p<1>;", ".reg .b16 %rs<1>;", ".reg .f32 %f<1>;", ".reg .b32 %r<1>;", ".reg .b64 %rd<2>;"]
    body = [f"{text}\nst.global.u64 [%rd1+{8 * n}], %rd0;" for n, (text, _, _) in enumerate(INSTRUCTIONS)]
    lines = [".entry edges(", ")", ".maxntid 32, 1, 1", "{", *registers, "ld.param.u64 %rd1, [edges_param_0];", *body, "ret;", "}"]
    emulated.compile_translated("\n".join(lines).replace("; ", ";\n"), "edges", tmp_path / "edges.o")
    run = ctypes.CDLL(str(emulated.link(library.parent, {"edges": tmp_path / "edges.o"}))).emulate_ptx
    run.argtypes, run.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_char_p
    results = torch.zeros(len(INSTRUCTIONS), dtype=torch.int64)
    assert run(b"edges", results.data_ptr()) is None
    for (text, dtype, want), result in zip(INSTRUCTIONS, results, strict=True):
        got = result[None].view(dtype)[0]
        assert torch.equal(got.nan_to_num(7), torch.tensor(want, dtype=dtype).nan_to_num(7)), f"{text} gave {got}"


def test_an_unknown_instruction_is_named(tmp_path):
    kernel = ".entry kernel(\n)\n.maxntid 32, 1, 1\n{\n.reg .b32 %r<3>;\nbrev.b32 %r1, %r2;\nret;\n}\n"
    with pytest.raises(AssertionError, match=r"kernel.ptx:6(.|\n)*brev_"):
        emulated.compile_translated(kernel, "kernel", tmp_path / "kernel.o")
    emulated.compile_translated(kernel.replace("brev", "not"), "kernel", tmp_path / "kernel.o")
