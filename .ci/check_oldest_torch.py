"""Compiles the bindings with the headers of the oldest torch that pyproject.toml admits: those of a newer one declare more.

The headers are taken from its smallest wheel, which is for macOS. Without nvcc the CUDA binding is left out, with a line that says so.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALLEST = ["--platform=macosx_14_0_arm64", "--python-version=3.12", "--only-binary=:all:", "--no-deps"]

(version,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
oldest = f"torch=={version}"
major, minor = map(int, version.split("."))
target = f"0x{major:02x}{minor:02x}000000000000"
if f'TARGET = "{target}"' not in (ROOT / "setup.py").read_text():
    sys.exit(f"setup.py must build for the torch that pyproject.toml requires, {oldest}: TARGET = {target!r}")

with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "download", *SMALLEST, "--dest", folder, oldest], check=True)
    (wheel,) = Path(folder).glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    for device, compiler in (("cpu", "c++"), ("cuda", "nvcc")):
        if not shutil.which(compiler):
            print(f"{oldest}: {device} skipped, {compiler} is not on PATH")
            continue
        source = ROOT / "csrc" / device / "bindings.cpp"
        flags = ["-std=c++17", f"-DTORCH_TARGET_VERSION={target}", "-DUSE_CUDA", "-isystem", f"{folder}/torch/include"]
        subprocess.run([compiler, *flags, "-c", str(source), "-o", f"{folder}/{device}.o"], check=True)
        print(f"{oldest}: {source.relative_to(ROOT)} compiles")
