"""Builds the wheel, with the CUDA library if nvcc is on PATH, and installs it in a folder of its own, ahead of the source tree. Runs a
layer with its compiled kernels, and torch.nn.SyncBatchNorm as the wheel's entry point replaces it. Then builds the source distribution,
and checks that it has what a build and the tests need. Both must have the license."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECK = """
import torch, syncbn
from syncbn import native
cpu, cuda = native.status()
assert cpu.loaded, cpu.reason
assert {folder!r} in syncbn.__file__, syncbn.__file__
x = torch.randn(2, 3, 4)
assert {nvcc} == cuda.path.exists(), cuda.path
assert torch.allclose(syncbn.SyncBatchNorm(3)(x), torch.nn.BatchNorm1d(3)(x), atol=1e-6)
print("wheel:", syncbn.__file__, cpu.reason, "with" if cuda.path.exists() else "without", "the CUDA library")
"""
REPLACED = """
import torch
from importlib.metadata import entry_points
(entry,) = [entry for entry in entry_points(group="torch.backends") if entry.name == "syncbn"]
assert {folder!r} in str(entry.dist.locate_file("")), entry.dist
layer = torch.nn.SyncBatchNorm(3)
print("its entry point:", *(cls.__module__ for cls in type(layer).__mro__ if cls.__module__.startswith("syncbn")))
assert layer(torch.randn(2, 3, 4)).isfinite().all()  # torch's own layer refuses the CPU
"""


def listed(*paths: str) -> list[str]:
    """The files that git tracks in these paths."""
    return subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


with tempfile.TemporaryDirectory() as folder:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    nvcc = "1" if shutil.which("nvcc") else "0"
    env = os.environ | {"SYNCBN_BUILD_CPU": "1", "SYNCBN_BUILD_CUDA": nvcc, "TORCH_CUDA_ARCH_LIST": "9.0"}
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, str(ROOT)], env=env, check=True)
    (wheel,) = Path(folder).glob("*.whl")
    assert "-py3-none-linux_" in wheel.name, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (license,) = (name for name in names if name.endswith("/LICENSE"))
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert archive.read(license) == (ROOT / "LICENSE").read_bytes()
        about = email.message_from_bytes(archive.read(metadata))
    assert (about["License-Expression"] or about["License"]) == "BSD-3-Clause", about.items()
    links = re.findall(r"\]\((?!https?://|#)[^)]*\)", about.get_payload())
    assert not links, f"relative links are dead in the long description: {links}"
    assert about["License-File"] == "LICENSE" and about["Author"] == "the syncbn authors" and about["Keywords"], about.items()
    subprocess.run([*pip, "install", "--no-deps", "--target", f"{folder}/site", str(wheel)], check=True)
    env = os.environ | {"PYTHONPATH": f"{folder}/site"}
    subprocess.run([sys.executable, "-c", CHECK.format(folder=folder, nvcc=nvcc == "1")], cwd=folder, env=env, check=True)
    env |= {"SYNCBN_REPLACE_TORCH": "1"}
    subprocess.run([sys.executable, "-c", REPLACED.format(folder=folder)], cwd=folder, env=env, check=True)

    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder], cwd=ROOT, check=True)
    (sdist,) = Path(folder).glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    folders = ["csrc", "syncbn", "tests", "launch", "benchmarks", "examples", "docs"]
    tracked = listed(*folders)
    top = [name for name in listed("*.*", "LICENSE") if "/" not in name and not name.startswith(".")]
    missing = {*tracked, *top} - packed
    assert tracked and not missing, f"not in {sdist.name}: {sorted(missing)}"
    print(f"sdist: all {len(tracked)} files of {', '.join(folders)}")
