"""The compiled libraries: when they are loaded, what is said when they are not, and which symbols they have."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from syncbn import environment, native

CPU = native.load()[0]
pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)]


def test_a_missing_library_says_what_to_do_and_warns_once(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_gpu_capabilities", lambda: ())
    with pytest.warns(native.FallbackWarning, match="reference on cpu: libsyncbn_cpu.so was not built; .* reinstall") as warned:
        cpu, _ = native.load.__wrapped__()
    assert not cpu.loaded and len(warned) == 1


def test_a_library_that_cannot_be_loaded_is_refused(monkeypatch, tmp_path):
    (tmp_path / "libsyncbn_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_gpu_capabilities", lambda: ())
    with pytest.warns(native.FallbackWarning, match="was built for another torch"):
        assert not native.load.__wrapped__()[0].loaded


def test_the_environment_turns_the_libraries_off_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr(environment, "settings", environment.settings._replace(native=False))
    assert [library.loaded for library in native.load.__wrapped__()] == [False, False] and not recwarn.list


@pytest.mark.parametrize("capability,refused", [(75, True), (80, False), (86, False), (90, True), (120, False), (130, False)])
def test_a_cuda_library_without_code_for_the_gpu_is_refused(monkeypatch, tmp_path, capability, refused):
    (tmp_path / "libsyncbn_cuda.so").write_bytes(b"\0 syncbn-cuda-archs=80 100 120+PTX; \0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_gpu_capabilities", lambda: (capability,))
    reason = native._why_not_cuda(tmp_path / "libsyncbn_cuda.so")
    assert (f"this GPU is sm_{capability}: set TORCH_CUDA_ARCH_LIST" in reason) == refused, reason


@pytest.mark.parametrize("driver,refused", [(12080, True), (13000, False), (13020, False), (0, False)])
def test_a_cuda_library_newer_than_the_driver_is_refused(monkeypatch, tmp_path, driver, refused):
    (tmp_path / "libsyncbn_cuda.so").write_bytes(b"\0 syncbn-cuda-archs=90;syncbn-cuda-version=13010; \0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(native, "_gpu_capabilities", lambda: (90,))
    monkeypatch.setattr(native, "_driver_version", lambda: driver)
    reason = native._why_not_cuda(tmp_path / "libsyncbn_cuda.so")
    assert reason.startswith("libsyncbn_cuda.so was built with CUDA 13.1, this driver is for 12.8: update it") == refused, reason


def test_the_library_exports_nothing_but_its_switch():
    assert ctypes.CDLL(str(CPU.path)).syncbn_cpu_isa
    assert not hasattr(ctypes.CDLL(str(CPU.path)), "_ZN6syncbn3cpu7kernelsEv")


def test_no_code_for_wide_vectors_can_be_linked_where_narrow_code_is_meant(tmp_path):
    """A weak symbol of two instruction sets would be merged, and a CPU without AVX-512 could get the wrong one."""
    sources = Path(__file__).parent.parent / "csrc/cpu"
    if not (shutil.which("g++") and shutil.which("nm") and sources.exists() and CPU.reason == "uses avx512"):
        pytest.skip("needs g++, nm and the sources")
    flags = ["-std=c++17", "-O2", "-march=x86-64-v4", "-mavx512bf16", "-DSYNCBN_ISA=avx512", "-c", "-o", str(tmp_path / "stats.o")]
    subprocess.run(["g++", *flags, str(sources / "stats.cpp")], check=True)
    symbols = subprocess.run(["nm", "-C", str(tmp_path / "stats.o")], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line[17:18] in "WVu" and "syncbn::cpu::avx512" not in line and "DW.ref" not in line]
    assert not shared, shared
