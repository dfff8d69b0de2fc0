"""The compiled libraries: when they are loaded, what is said when they are not, and which symbols they have."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import ROOT
from syncbn import build_info, environment, gpus, native, ops

CPU = native.status()[0]
DIGEST = build_info.digest(ops.SCHEMAS)
pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)]


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """The reason why a library with this content, or this path, is not loaded."""

    def ask(content: bytes | Path) -> str:
        path = content if isinstance(content, Path) else tmp_path / "libsyncbn_cpu.so"
        if isinstance(content, bytes):
            path.write_bytes(content)
        monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("was loaded"))
        library = native._load("cpu", path, DIGEST)
        assert not library.loaded
        return library.reason

    return ask


def patched(offset: int, replacement: bytes) -> bytes:
    whole = CPU.path.read_bytes()
    return whole[:offset] + replacement + whole[offset + len(replacement) :]


DAMAGED = {
    "empty": (lambda: b"", "is no library, or not a whole one: it has 0 bytes"),
    "a text": (lambda: b"version https://git-lfs.github.com/spec/v1" * 3, "is no library, or not a whole one: it has 126 bytes"),
    "its first bytes": (lambda: CPU.path.read_bytes()[:40], "is no library, or not a whole one: it has 40 bytes"),
    "its header": (lambda: CPU.path.read_bytes()[:64], "is damaged|is not whole"),
    "half of it": (lambda: CPU.path.read_bytes()[: CPU.path.stat().st_size // 2], "is not whole: it has [0-9,]+ of [0-9,]+ bytes"),
    "an offset in its header": (lambda: patched(32, b"\xff" * 8), "is damaged"),
    "all but a byte": (lambda: CPU.path.read_bytes()[:-1], "is not whole: it has [0-9,]+ of [0-9,]+ bytes"),
    "zeros at the end": (lambda: CPU.path.read_bytes()[:-8192] + bytes(8192), "is damaged: its last part is not what a linker writes"),
    "another processor": (lambda: patched(18, b"\x16\0"), "is for another kind of processor, this machine is"),
    "32 bits": (lambda: patched(4, b"\1"), "is for .*, this machine is"),
    "other ops": (lambda: CPU.path.read_bytes().replace(DIGEST.encode(), b"0" * len(DIGEST)), "another version of syncbn, with other ops"),
    "no record of its ops": (lambda: CPU.path.read_bytes().replace(b"schemas=", b"nothing="), "another version of syncbn, with other ops"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_library_that_would_fail_is_not_loaded_and_the_reason_is_true(refused, kind):
    content, reason = DAMAGED[kind]
    assert re.search(f"libsyncbn_cpu.so .*{reason}.*: reinstall", said := refused(content())), said


def test_a_library_that_cannot_be_read_is_not_loaded(refused, tmp_path):
    (tmp_path / "folder.so").mkdir()
    assert refused(tmp_path / "folder.so").startswith("folder.so cannot be read ([Errno 21] Is a directory")


def test_what_the_linker_of_torch_says_is_the_reason(monkeypatch):
    def fail(path):
        raise OSError(f"Could not load this library: {path}") from OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    reason = native._load("cpu", CPU.path, DIGEST).reason
    assert f"cannot be loaded with torch {torch.__version__} (libgomp.so.1: cannot open shared object file): reinstall" in reason


def test_the_digest_is_that_of_names_and_schemas_in_any_order():
    assert build_info.read(CPU.path) == {"schemas": DIGEST}
    assert build_info.digest(dict(reversed(ops.SCHEMAS.items()))) == DIGEST
    for name, schema in ops.SCHEMAS.items():
        assert build_info.digest(ops.SCHEMAS | {name: schema.replace("Tensor x", "Tensor y")}) != DIGEST
        assert build_info.digest({other: schema for other, schema in ops.SCHEMAS.items() if other != name}) != DIGEST


@pytest.mark.skipif(not shutil.which("strip"), reason="needs strip, of binutils")
def test_a_stripped_library_still_says_what_it_was_built_for(tmp_path):
    subprocess.run(["strip", "-o", tmp_path / "stripped.so", CPU.path], check=True)
    assert build_info.read(tmp_path / "stripped.so") == {"schemas": DIGEST}


IMPORTED = """
import os, warnings
os.environ["SYNCBN_CPU_ISA"] = "sse"
warnings.simplefilter("error", UserWarning)
for cure in (lambda: os.environ.pop("SYNCBN_CPU_ISA"), lambda: warnings.simplefilter("ignore"), lambda: None):
    try:
        import syncbn
    except (ValueError, UserWarning) as error:
        print(error)
    cure()
import torch
x = torch.randn(4, 3, requires_grad=True)
syncbn.SyncBatchNorm(3)(x).square().sum().backward()
print(x.grad.shape, syncbn.native.status()[0].loaded)
"""


def test_after_a_wrong_variable_and_a_warning_that_is_an_error_the_import_can_be_repeated(tmp_path, forks, subprocess_env):
    """With half a library, which would end the process if it was loaded. The layer then trains by the reference."""
    shutil.copytree(native.FOLDER, tmp_path / "syncbn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    half = CPU.path.read_bytes()[: CPU.path.stat().st_size // 2]
    (tmp_path / "syncbn/libsyncbn_cpu.so").write_bytes(half)
    (tmp_path / "job.py").write_text(IMPORTED)  # its folder is the first on sys.path
    (done,) = forks.run(tmp_path / "job.py", env=subprocess_env, timeout=100)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done
    assert lines[0] == "environment variable SYNCBN_CPU_ISA is 'sse': it must be avx512, avx2 or baseline"
    assert lines[1].startswith(f"syncbn runs its slower reference on cpu: libsyncbn_cpu.so is not whole: it has {len(half):,} of ")
    assert lines[2] == "torch.Size([4, 3]) False"


def test_a_missing_library_says_what_to_do_and_warns_once(monkeypatch, tmp_path):
    (tmp_path / "libsyncbn_cpu.reason").write_text("no C++ compiler is on PATH")  # as setup.py leaves it
    library = native._load("cpu", tmp_path / "libsyncbn_cpu.so", DIGEST)
    monkeypatch.setattr(native, "_libraries", (library, native._load("cuda", tmp_path / "libsyncbn_cuda.so", DIGEST)))
    monkeypatch.setattr(gpus, "capabilities", lambda: ())
    words = r"reference on cpu: libsyncbn_cpu.so was not built \(no C\+\+ compiler is on PATH\); with a C\+\+ compiler on PATH, reinstall"
    with pytest.warns(native.FallbackWarning, match=words) as warned:
        native.warn()
    assert not library.loaded and len(warned) == 1


@pytest.mark.parametrize("platform,name", [("darwin", "macOS"), ("win32", "Windows")])
def test_where_a_compiler_would_not_help_none_is_asked_for(monkeypatch, tmp_path, platform, name):
    monkeypatch.setattr(sys, "platform", platform)
    reason = native._why_not("cpu", tmp_path / "libsyncbn_cpu.so", DIGEST)
    assert f"on {name} plain torch does all the work" in reason and "compiler" not in reason


def test_the_environment_turns_the_libraries_off_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr(environment, "settings", environment.settings._replace(native=False))
    monkeypatch.setattr(native, "_libraries", native._libraries)  # restored afterwards
    assert [library.loaded for library in native.load(ops.SCHEMAS)] == [False, False]
    native.warn()
    assert not recwarn.list


# ---- CUDA ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built,capabilities,refused", [
    ("80 100 120+PTX", (75,), "this GPU is sm_75: set TORCH_CUDA_ARCH_LIST"),
    ("80 100 120+PTX", (80,), ""),
    ("80 100 120+PTX", (86,), ""),
    ("80 100 120+PTX", (90, 90), "this GPU is sm_90: set TORCH_CUDA_ARCH_LIST"),
    ("80 100 120+PTX", (120,), ""),
    ("80 100 120+PTX", (130,), ""),
    ("90a", (90,), ""),
    ("90a", (91,), "this GPU is sm_91"),
    ("80 90a+PTX", (90,), ""),
    ("80 90a+PTX", (100,), "this GPU is sm_100"),  # the PTX of 90a is for 9.0 alone
    ("75 90", (90, 75), ""),
    ("90", (90, 75), "a visible GPU is sm_75: set .*, or hide that GPU with CUDA_VISIBLE_DEVICES"),  # one that fits is not enough
    ("90", (61, 75), "a visible GPU is sm_61/sm_75: set TORCH_CUDA_ARCH_LIST"),
    ("90", (), ""),  # no management library: CUDA itself will say
])  # fmt: skip
def test_a_cuda_library_must_run_on_every_visible_gpu(monkeypatch, built, capabilities, refused):
    monkeypatch.setattr(gpus, "driver_version", lambda: 0)
    reason = native._why_a_gpu_cannot_run_it("libsyncbn_cuda.so", {"archs": built, "cuda": "13000"}, capabilities)
    assert re.match(f"libsyncbn_cuda.so has code for sm {re.escape(built)}, {refused}", reason) if refused else not reason, reason


@pytest.mark.parametrize("driver,refused", [(12080, True), (13000, False), (13020, False), (0, False)])
def test_a_cuda_library_newer_than_the_driver_is_refused(monkeypatch, driver, refused):
    monkeypatch.setattr(gpus, "driver_version", lambda: driver)
    reason = native._why_a_gpu_cannot_run_it("libsyncbn_cuda.so", {"archs": "90", "cuda": "13010"}, (90,))
    assert reason.startswith("libsyncbn_cuda.so was built with CUDA 13.1, this driver is for 12.8: update it") == refused, reason


@pytest.mark.parametrize("capabilities,cuda,reason", [
    ((), None, "no GPU is visible"),
    ((90,), None, "libsyncbn_cuda.so is not whole"),
    (None, False, "no GPU is visible"),
    (None, True, "libsyncbn_cuda.so is not whole"),
])  # fmt: skip
def test_the_cuda_library_is_looked_at_only_where_a_gpu_is_visible(monkeypatch, tmp_path, capabilities, cuda, reason):
    """Only without NVML, where there are no `capabilities`, does `cuda` count: CUDA initializes itself if it is asked. A warning is of the
    CPU's library unless a GPU is visible."""
    path = tmp_path / "libsyncbn_cuda.so"
    path.write_bytes(CPU.path.read_bytes()[:-1])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was asked") if cuda is None else cuda)
    monkeypatch.setattr(gpus, "capabilities", lambda: capabilities)
    library = native._load("cuda", path, DIGEST)
    assert library.reason.startswith(reason)
    monkeypatch.setattr(native, "_libraries", (native._load("cpu", tmp_path / "none.so", DIGEST), library))
    warned = reason if capabilities or cuda else "none.so was not built"
    with pytest.warns(native.FallbackWarning, match=re.escape(warned)):
        native.warn()


# ---- Symbols ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils")
def test_the_library_exports_only_the_functions_that_python_calls():
    """Another symbol of syncbn could be taken for one of the same name in another library, such as that for CUDA."""
    listed = subprocess.run(["nm", "-D", "--defined-only", CPU.path], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[2] for line in listed.splitlines() if "syncbn" in line}
    sources = (native.FOLDER / name for name in ("native.py", "comm/shared_memory.py"))
    assert exported == {name for path in sources for name in re.findall(r"\bsyncbn_(?:cpu|shared)_\w+", path.read_text())}


def test_instruction_sets_share_no_symbols(tmp_path):
    """A weak symbol of two instruction sets would be merged, and a CPU without AVX-512 could get the wrong one."""
    sources = ROOT / "csrc/cpu"
    if not (shutil.which("g++") and shutil.which("nm") and sources.exists() and CPU.reason == "uses avx512"):
        pytest.skip("needs g++, nm and the sources")
    flags = ["-std=c++17", "-O2", "-march=x86-64-v4", "-mavx512bf16", "-DSYNCBN_ISA=avx512", "-c", "-o", str(tmp_path / "stats.o")]
    subprocess.run(["g++", *flags, str(sources / "stats.cpp")], check=True)
    symbols = subprocess.run(["nm", "-C", str(tmp_path / "stats.o")], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line[17:18] in "WVu" and "syncbn::cpu::avx512" not in line and "DW.ref" not in line]
    assert not shared, shared
