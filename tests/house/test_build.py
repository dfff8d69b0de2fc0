"""What setup.py builds, and what it reports if it cannot."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution, Extension

from support import ROOT
from syncbn import build_info, ops

pytestmark = pytest.mark.world_size(1)
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc on PATH")
FOR_ARM = "aarch64-linux-gnu-g++"
needs_cross_compiler = pytest.mark.skipif(not shutil.which(FOR_ARM), reason=f"needs {FOR_ARM}: apt-get install g++-aarch64-linux-gnu")


def build(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60)


def test_the_installed_package_is_found_from_a_folder_that_contains_a_clone_of_its_name(tmp_path):
    """To Python a folder without __init__.py is a namespace package, which hides an editable install by a finder."""
    (tmp_path / "syncbn").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "from importlib.util import find_spec; print(find_spec('syncbn').origin)"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()).name == "__init__.py", done


@pytest.mark.parametrize("library,compiler", [("CPU", "CXX"), ("CUDA", "NVCC")])
def test_without_a_compiler_a_library_is_left_out_with_its_reason(library, compiler, tmp_path):
    others = {"SYNCBN_BUILD_CPU": "0", "SYNCBN_BUILD_CUDA": "0"}
    missing = {compiler: "no-such-compiler"}
    done = build(tmp_path, **others | missing | {f"SYNCBN_BUILD_{library}": ""})
    reason = f"libsyncbn_{library.lower()}.so is not built: {compiler} is 'no-such-compiler', which is not on PATH"
    assert done.returncode == 0 and reason in done.stderr and not list(tmp_path.rglob("*.so"))
    said = (tmp_path / f"syncbn/libsyncbn_{library.lower()}.reason").read_text()  # which the warning at import repeats
    assert said and reason.endswith(f": {said}")
    done = build(tmp_path, **others | missing | {f"SYNCBN_BUILD_{library}": "1"})
    assert done.returncode != 0 and reason in done.stderr


def test_a_build_in_place_that_leaves_a_library_out_removes_the_old_one(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("SYNCBN_BUILD_CPU", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "syncbn").mkdir()
    old = tmp_path / "syncbn/libsyncbn_cpu.so"
    old.touch()
    extension = Extension("syncbn.libsyncbn_cpu", [], optional=True)
    command = setup["BuildLibraries"](Distribution({"packages": ["syncbn"], "ext_modules": [extension]}))
    command.inplace = True
    command.ensure_finalized()
    command.run()
    assert not old.exists() and old.with_suffix(".reason").read_text() == "SYNCBN_BUILD_CPU was 0"


def test_a_build_with_a_compiler_that_sees_no_torch_fails_and_says_which_flag_cures_it(setup, monkeypatch, tmp_path):
    """Installers show the output of a build only if it fails: a build without kernels would look like any other."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr("sysconfig.get_path", lambda name: "")
    monkeypatch.setattr("site.getsitepackages", list)
    monkeypatch.setattr("os.get_exec_path", lambda: [str(tmp_path)])
    monkeypatch.delenv("SYNCBN_BUILD_CPU", raising=False)
    monkeypatch.chdir(tmp_path)  # without a .venv
    setup["COMMANDS"]["syncbn.libsyncbn_cpu"] = lambda temp: setup["torch_flags"]()
    command = setup["BuildLibraries"](Distribution({"ext_modules": [Extension("syncbn.libsyncbn_cpu", [], optional=True)]}))
    command.ensure_finalized()
    with pytest.raises(SystemExit, match="does not see.*`uv pip install --no-build-isolation .`; or set SYNCBN_BUILD_CPU=0"):
        command.run()


@pytest.mark.parametrize("where", ["active", "beside the source"])
def test_an_isolated_build_finds_torch_in_the_environment_to_install_into(setup, monkeypatch, tmp_path, where):
    """uv's builds run in an environment of their own, with the active one after it on PATH."""
    torch, old = tmp_path / ".venv/lib/python3.11/site-packages/torch", tmp_path / "old/torch"
    for folder, version in ((torch, "2.11.0+cu130"), (old, "2.9.1")):
        folder.mkdir(parents=True)
        (folder / "version.py").write_text(f"from typing import Optional\n\n__version__ = '{version}'\n")
    monkeypatch.setattr(sys, "path", [str(old.parent)])  # a torch that is too old is passed over
    monkeypatch.setattr("sysconfig.get_path", lambda name: "")
    monkeypatch.setattr("site.getsitepackages", list)
    monkeypatch.setattr("os.get_exec_path", lambda: ["/usr/bin", *([str(tmp_path / ".venv/bin")] if where == "active" else [])])
    monkeypatch.chdir(ROOT if where == "active" else tmp_path)
    if where == "active":  # this checkout may have a .venv of its own
        monkeypatch.chdir(tmp_path / ".venv")
    assert setup["torch_folder"]() == torch


def test_the_digest_in_the_library_is_made_of_the_table_of_ops(setup):
    assert setup["schemas_digest"]() == build_info.digest(ops.SCHEMAS)


def test_a_build_with_nothing_compiled_is_a_wheel_for_any_platform_and_says_so(tmp_path):
    env = os.environ | {"SYNCBN_BUILD_CPU": "0", "SYNCBN_BUILD_CUDA": "0"}
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        str(tmp_path / "build"),
        "bdist_wheel",
        "--dist-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr.count("nothing is compiled in this build, plain Python for any platform") == 1, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "syncbn/__init__.py" in names and not [name for name in names if name.endswith(".so")]
        (about,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: true\nTag: py3-none-any\n" in archive.read(about).decode()


@pytest.fixture
def setup(monkeypatch):
    """The names in setup.py."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--version"])
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


@pytest.fixture
def architectures(setup, monkeypatch):
    """setup.py's function of that name, for this TORCH_CUDA_ARCH_LIST."""

    def ask(wanted: str | None) -> tuple[list[str], str]:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        if wanted is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        return setup["architectures"](["nvcc"])

    return ask


def test_arch_list_uses_torchs_syntax(architectures):
    assert architectures("9.0") == (["-gencode=arch=compute_90,code=sm_90"], "90")
    flags, names = architectures("8.0;9.0a+PTX")
    codes = [flag.rpartition("code=")[2] for flag in flags]
    assert codes == ["sm_80", "sm_90a", "compute_90a"] and names == "80 90a+PTX"
    with pytest.raises(Exception, match="TORCH_CUDA_ARCH_LIST must be numbers such as .* got 'sm_90'"):
        architectures("sm_90")


@needs_nvcc
def test_default_architectures_span_turing_to_newest(architectures):
    flags, names = architectures(None)
    assert names.startswith("75 80 86 89 90") and names.endswith("+PTX") and names.count("PTX") == 1
    assert [flag for flag in flags if "code=compute_" in flag] == flags[-1:]


def test_the_compiler_says_for_which_processor_the_kernels_are_compiled(setup, monkeypatch, tmp_path):
    """The machine that runs the compiler does not say it: a cross compiler's code is for another."""
    isas = {}
    for target in ("x86_64-linux-gnu", "aarch64-linux-gnu"):
        compiler = tmp_path / f"{target}-g++"
        compiler.write_text(f"#!/bin/sh\necho {target}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        flags = [flag for command in setup["cpu_commands"](tmp_path)[0] for flag in command]
        isas[target] = {flag for flag in flags if flag.startswith(("-DSYNCBN_ISA", "-DSYNCBN_X86", "-march"))}
    assert isas["aarch64-linux-gnu"] == {"-DSYNCBN_ISA=baseline"}
    assert {"-DSYNCBN_X86", "-DSYNCBN_ISA=avx512", "-march=x86-64-v4"} < isas["x86_64-linux-gnu"]


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH")
def test_a_gcc_whose_level_of_optimization_vectorizes_nothing_is_told_to(setup, monkeypatch, tmp_path):
    """As GCC 11's: the option that is inserted makes another version's the same."""
    monkeypatch.setenv("CXX", "g++")
    (command,) = (command for command in setup["cpu_commands"](tmp_path)[0] if command[-1].endswith("stats.baseline.o"))
    command.insert(command.index("-O2") + 1, "-fno-tree-vectorize")
    done = subprocess.run([*command, "-fopt-info-vec"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "loop vectorized" in done.stderr, done.stderr[:500]


@needs_cross_compiler
def test_the_cpu_kernels_compile_for_aarch64_without_a_warning(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", FOR_ARM)
    for command in setup["cpu_commands"](tmp_path)[0]:
        done = subprocess.run([*command, "-fsyntax-only", "-Werror"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_scripts_say_that_they_compile_before_they_do(tmp_path, compiled, gpu):
    """The python and nvidia-smi here are stand-ins. Once the objects are there, the line is not printed."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
    for name in ["python", *(["nvidia-smi"] if gpu else [])]:
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text('#!/bin/sh\ncase "$*" in *"install --quiet --no-build"*) echo installs;; esac\n')
        (tmp_path / "bin" / name).chmod(0o755)
    if compiled:
        (tmp_path / "build/objects/libsyncbn_cpu").mkdir(parents=True)
        (tmp_path / "build/objects/libsyncbn_cpu/stats.o").touch()
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}
    done = subprocess.run(["bash", tmp_path / "launch/environment.sh", "test"], env=env, capture_output=True, text=True, timeout=60)
    line = "Compiling the kernels for the CPU: about two minutes on two cores, the first time"
    line += ", and for the GPU, which takes minutes more" if gpu else ""
    assert done.returncode == 0 and done.stdout.splitlines() == ([] if compiled else [line]) + ["installs"], done
