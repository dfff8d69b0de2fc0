"""Finds the compiled libraries beside this file and loads them, or says why not; then the reference runs on that device.

SYNCBN_NATIVE=0 turns both off; SYNCBN_CPU_ISA is the widest instruction set that the CPU kernels use.
"""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build_info, environment, gpus

FOLDER = Path(__file__).parent
MINIMUM_TORCH = (2, 11)
REBUILD = "reinstall with `pip install --no-build-isolation --force-reinstall --no-deps .` from its source"


class FallbackWarning(UserWarning):
    """No compiled kernel runs on the device at hand: the reference, in plain torch, does its work, slower."""


@dataclass(frozen=True)
class Library:
    device: str  # "cpu" or "cuda"
    path: Path
    loaded: bool
    reason: str  # why it was not loaded; else what runs


_libraries: tuple[Library, ...] = ()


def status() -> tuple[Library, ...]:
    """What was loaded for each device type, and why not."""
    return _libraries


def load(schemas: Mapping[str, str]) -> tuple[Library, ...]:
    """Loads the libraries that implement these ops and run here. Raises and warns about nothing: ops.py could not be imported again."""
    global _libraries
    digest = build_info.digest(schemas)
    _libraries = tuple(_load(device, FOLDER / f"libsyncbn_{device}.so", digest) for device in ("cpu", "cuda"))
    return _libraries


def warn() -> None:
    """Warns if nothing compiled runs on the device that this machine would use."""
    device = "cuda" if torch.version.cuda and gpus.capabilities() else "cpu"
    for library in status():
        if library.device == device and not library.loaded and environment.settings.native:
            warnings.warn(f"syncbn runs its slower reference on {device}: {library.reason}", FallbackWarning, stacklevel=3)


def _load(device: str, path: Path, digest: str) -> Library:
    try:
        reason = _why_not(device, path, digest)
        if not reason:
            torch.ops.load_library(path)
    except build_info.Unusable as error:
        reason = f"{path.name} {error}: {REBUILD}"
    except OSError as error:  # torch's says which file, and its cause why
        reason = f"{path.name} cannot be loaded beside torch {torch.__version__} ({error.__cause__ or error}): {REBUILD}"
    if reason:
        return Library(device, path, False, reason)
    return Library(device, path, True, _what_runs(device, path))


def _what_runs(device: str, path: Path) -> str:
    if device == "cuda":
        return f"compiled for sm {build_info.read(path).get('archs', '')}"
    # On a processor without an instruction set of that name: what every processor has.
    return f"uses {cpu_isa(path, environment.settings.cpu_isa) or cpu_isa(path, 'baseline')}"


def _why_not(device: str, path: Path, digest: str) -> str:
    """Why this library is not loaded; empty if it can be. Raises Unusable."""
    if not environment.settings.native:
        return "turned off by SYNCBN_NATIVE=0"
    capabilities = gpus.capabilities() if device == "cuda" and torch.version.cuda else None
    if device == "cuda" and not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA"
    if device == "cuda" and (capabilities == () or (capabilities is None and not torch.cuda.is_available())):
        return "no GPU is visible"
    if not path.exists():
        return _why_not_built(device, path)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return f"{path.name} needs torch 2.11 or newer, this is {torch.__version__}: update torch"
    info = build_info.read(path)
    if info.get("schemas") != digest:
        return f"{path.name} was built from another version of syncbn, with other ops: {REBUILD}"
    return _why_no_gpu_runs_it(path.name, info, capabilities or ()) if device == "cuda" else ""


def _why_not_built(device: str, path: Path) -> str:
    if sys.platform != "linux":
        system = {"darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
        return f"its compiled kernels are for Linux, on {system} all of it runs in plain torch; SYNCBN_NATIVE=0 turns this warning off"
    compiler = "nvcc" if device == "cuda" else "a C++ compiler"
    reason = path.with_suffix(".reason")  # left by setup.py
    said = f" ({reason.read_text()})" if reason.exists() else ""
    return f"{path.name} was not built{said}; with {compiler} on PATH, {REBUILD}"


def _why_no_gpu_runs_it(name: str, info: Mapping[str, str], capabilities: tuple[int, ...]) -> str:
    """It must run on each visible GPU, since it serves all of them."""
    built, version, driver = info.get("archs", ""), int(info.get("cuda", 0)), gpus.driver_version()
    if driver and driver // 1000 < version // 1000:
        needs, has = (f"{number // 1000}.{number % 1000 // 10}" for number in (version, driver))
        return f"{name} was built with CUDA {needs}, this driver is for {has}: update it, or {REBUILD} with an nvcc of that version"
    refused = sorted({capability for capability in capabilities if not _runs(built, capability)})
    if not refused:
        return ""
    which = "this GPU is" if len(set(capabilities)) == 1 else "a visible GPU is"
    only = ""
    if len(refused) < len(set(capabilities)):
        only = ", or hide that GPU with CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER=PCI_BUS_ID"
    gpu = "/".join(f"sm_{capability}" for capability in refused)
    return f"{name} has code for sm {built}, {which} {gpu}: set TORCH_CUDA_ARCH_LIST and {REBUILD}{only}"


def _runs(built: str, capability: int) -> bool:
    """Code for x.y runs on x.z with z >= y, for x.ya on x.y alone; PTX runs on anything newer."""
    for name in built.split():
        if name[-1] in "af":
            if int(name[:-1]) == capability:
                return True
            continue
        number = int(re.sub(r"\D", "", name))
        if number <= capability and (number // 10 == capability // 10 or name.endswith("+PTX")):
            return True
    return False


def cpu_isa(path: Path, at_most: str = "") -> str | None:
    """The instruction set that the CPU kernels use, after limiting it to `at_most`; None if the library has none of that name."""
    function = ctypes.CDLL(str(path)).syncbn_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    name = function(at_most.encode() or None)
    return name.decode() if name else None
