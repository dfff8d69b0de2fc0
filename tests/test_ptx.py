"""The CUDA kernels as nvcc compiles them: their PTX, run on the CPU, against the float64 reference."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace

import emulated
import pytest
from op_cases import CHECKS, table
from test_mutations import is_noticed

pytestmark = [
    pytest.mark.world_size(1),
    pytest.mark.skipif(not (emulated.COMPILER and emulated.NVCC), reason="g++ and nvcc are not both on PATH"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulated.build_from_ptx(tmp_path_factory.mktemp("ptx"))


@pytest.mark.parametrize("case", table(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_equals_the_reference(library, op, case):
    seed = zlib.crc32(repr((case, op)).encode())
    misaligned = emulated.OPS[op] if seed // 3 % 4 == 3 else ()
    CHECKS[op](replace(emulated.Emulated.load(library), seed=seed, sm_count=(1, 2, 7)[seed % 3], misaligned=misaligned), case)


@pytest.mark.parametrize("op", emulated.OPS)
def test_the_kernels_as_they_are_survive(library, op):
    assert not is_noticed(library, op)


@pytest.mark.parametrize(
    ("op", "old", "new"),
    [
        ("stats", r"bar\.sync\s+0;", ""),
        ("normalize", r"(fma\.rn\.f32\s+%f\d+, )(%f\d+, )", r"\1 0f3F800000, "),
        ("backward_reduce", r"shfl\.sync(\S+\s+\S+, \S+, )\S+,", r"shfl.sync\1 1,"),
        ("backward_input", r"(ld\.global\.v4\.\S+\s+{[^}]*}, \[%rd\d+)\]", r"\1+4]"),
    ],
    ids=["barriers", "factors", "lanes", "addresses"],
)
def test_what_is_wrong_in_the_ptx_is_noticed(library, tmp_path, op, old, new):
    text = (library.parent / f"{op}.ptx").read_text()
    changed = re.sub(old, new, text)
    assert changed != text
    emulated.compile_translated(changed, op, tmp_path / "mutant.o")
    assert is_noticed(emulated.link(library.parent, {f"{op}_ptx": tmp_path / "mutant.o"}), op)


def test_an_unknown_instruction_is_named(tmp_path):
    kernel = ".entry kernel(\n)\n.maxntid 32, 1, 1\n{\n.reg .b32 %r<3>;\nbrev.b32 %r1, %r2;\nret;\n}\n"
    with pytest.raises(AssertionError, match=r"kernel.ptx:6(.|\n)*brev_"):
        emulated.compile_translated(kernel, "kernel", tmp_path / "kernel.o")
    emulated.compile_translated(kernel.replace("brev", "not"), "kernel", tmp_path / "kernel.o")
