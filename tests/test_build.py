"""What setup.py builds, and what it says where it cannot."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.world_size(1)
ROOT = Path(__file__).parent.parent
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc on PATH")


def build(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("library,compiler", [("CPU", "CXX"), ("CUDA", "NVCC")])
def test_without_a_compiler_a_library_is_left_out_with_its_reason(library, compiler, tmp_path):
    others = {"SYNCBN_BUILD_CPU": "0", "SYNCBN_BUILD_CUDA": "0"}
    missing = {compiler: "no-such-compiler"}
    done = build(tmp_path, **others | missing | {f"SYNCBN_BUILD_{library}": ""})
    reason = f"libsyncbn_{library.lower()}.so is not built: {compiler} is 'no-such-compiler', which is not on PATH"
    assert done.returncode == 0 and reason in done.stderr and not list(tmp_path.rglob("*.so"))
    done = build(tmp_path, **others | missing | {f"SYNCBN_BUILD_{library}": "1"})
    assert done.returncode != 0 and reason in done.stderr


@pytest.fixture
def architectures(monkeypatch):
    """setup.py's function of that name, for this TORCH_CUDA_ARCH_LIST."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--version"])
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py")

    def ask(wanted: str | None) -> tuple[list[str], str]:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        if wanted is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        return names["architectures"](["nvcc"])

    return ask


def test_architectures_are_torchs_list(architectures):
    assert architectures("9.0") == (["-gencode=arch=compute_90,code=sm_90"], "90")
    flags, names = architectures("8.0;9.0a+PTX")
    codes = [flag.rpartition("code=")[2] for flag in flags]
    assert codes == ["sm_80", "sm_90a", "compute_90a"] and names == "80 90a+PTX"
    with pytest.raises(Exception, match="TORCH_CUDA_ARCH_LIST must be numbers such as .* got 'sm_90'"):
        architectures("sm_90")


@needs_nvcc
def test_by_default_from_turing_to_the_newest_that_nvcc_knows(architectures):
    flags, names = architectures(None)
    assert names.startswith("75 80 86 89 90") and names.endswith("+PTX") and names.count("PTX") == 1
    assert [flag for flag in flags if "code=compute_" in flag] == flags[-1:]
