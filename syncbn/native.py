"""Loads the compiled libraries next to this file. If one cannot be loaded, the reference runs on its device, and `status` says why.

SYNCBN_NATIVE=0 turns both libraries off. SYNCBN_CPU_ISA names the widest instruction set that the CPU kernels may use.
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
    """No compiled kernel runs on this machine's device: the reference, in plain torch, does the work, more slowly."""


@dataclass(frozen=True)
class Library:
    """What became of one compiled library."""

    device: str  # "cpu" or "cuda"
    path: Path
    loaded: bool
    reason: str  # if it was not loaded, why not and what to do; else which of its code runs


_libraries: tuple[Library, ...] = ()


def status() -> tuple[Library, ...]:
    """The library for the CPU, then the one for CUDA. Empty until `load` has been called, which importing syncbn does."""
    return _libraries


def load(schemas: Mapping[str, str]) -> tuple[Library, ...]:
    """Loads each library that implements these ops and runs on this machine.

    Args:
        schemas: the ops' schemas by name. A library that was built from others is not loaded.

    Returns:
        what `status` returns from now on.

    A failure is a `reason`, never an exception or a warning: after an exception, ops.py could not be imported a second time.
    """
    global _libraries
    digest = build_info.digest(schemas)
    _libraries = tuple(_load(device, FOLDER / f"libsyncbn_{device}.so", digest) for device in ("cpu", "cuda"))
    return _libraries


def warn() -> None:
    """Gives a FallbackWarning if this machine's device (CUDA if torch is built for it and a GPU is visible, else the CPU) has no compiled
    kernels, unless SYNCBN_NATIVE=0 asks for that."""
    if not environment.settings.native:
        return
    device = "cuda" if torch.version.cuda and _a_gpu_is_visible() else "cpu"
    for library in status():
        if library.device == device and not library.loaded:
            warnings.warn(f"syncbn runs its slower reference on {device}: {library.reason}", FallbackWarning, stacklevel=3)


def _load(device: str, path: Path, digest: str) -> Library:
    try:
        reason = _why_not(device, path, digest)
        if not reason:
            torch.ops.load_library(path)
    except build_info.Unusable as error:
        reason = f"{path.name} {error}: {REBUILD}"
    except OSError as error:  # torch's error names the file, and its cause the reason
        reason = f"{path.name} cannot be loaded with torch {torch.__version__} ({error.__cause__ or error}): {REBUILD}"
    if reason:
        return Library(device, path, False, reason)
    return Library(device, path, True, _what_runs(device, path))


def _what_runs(device: str, path: Path) -> str:
    if device == "cuda":
        return f"compiled for sm {build_info.read(path).get('archs', '')}"
    # Of the names that SYNCBN_CPU_ISA may have, a library for ARM has baseline only.
    return f"uses {cpu_isa(path, environment.settings.cpu_isa) or cpu_isa(path, 'baseline')}"


def _why_not(device: str, path: Path, digest: str) -> str:
    """Why this library is not loaded; empty if it can be.

    Raises:
        build_info.Unusable: the file is damaged, or for another kind of processor.
    """
    if not environment.settings.native:
        return "turned off by SYNCBN_NATIVE=0"
    if device == "cuda" and not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA"
    if device == "cuda" and not _a_gpu_is_visible():
        return "no GPU is visible"
    if not path.exists():
        return _why_not_built(device, path)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return f"{path.name} needs torch 2.11 or newer, this is {torch.__version__}: update torch"
    info = build_info.read(path)
    if info.get("schemas") != digest:
        return f"{path.name} was built from another version of syncbn, with other ops: {REBUILD}"
    return _why_a_gpu_cannot_run_it(path.name, info, gpus.capabilities() or ()) if device == "cuda" else ""


def _a_gpu_is_visible() -> bool:
    """Asks CUDA only if NVML cannot tell."""
    capabilities = gpus.capabilities()
    return torch.cuda.is_available() if capabilities is None else bool(capabilities)


def _why_not_built(device: str, path: Path) -> str:
    if sys.platform != "linux":
        system = {"darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
        return f"the compiled kernels are for Linux; on {system} plain torch does all the work; SYNCBN_NATIVE=0 turns this warning off"
    compiler = "nvcc" if device == "cuda" else "a C++ compiler"
    reason = path.with_suffix(".reason")  # left by setup.py
    because = f" ({reason.read_text()})" if reason.exists() else ""
    return f"{path.name} was not built{because}; with {compiler} on PATH, {REBUILD}"


def _why_a_gpu_cannot_run_it(name: str, info: Mapping[str, str], capabilities: tuple[int, ...]) -> str:
    """Why a library cannot serve every visible GPU; empty if it can.

    Args:
        name: the library's file name.
        info: what `build_info.read` found in it: `cuda`, such as 13000, and `archs`, such as "75 80 90a 120+PTX".
        capabilities: of the visible GPUs, such as (90, 90).
    """
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
    """Whether code for the architectures `built` runs on a GPU of this compute capability: code for x.y runs on x.z if z >= y, its
    PTX on anything newer, and code and PTX for x.ya on x.y alone. Those for x.yf are taken for x.y alone, although some newer GPUs run
    them, too. (CUDA C++ Programming Guide, "Application Compatibility")"""
    for name in built.split():
        number = int(re.sub(r"\D", "", name))
        if name.removesuffix("+PTX")[-1] in "af":
            runs = number == capability
        else:
            runs = number <= capability and (number // 10 == capability // 10 or name.endswith("+PTX"))
        if runs:
            return True
    return False


def cpu_isa(path: Path, at_most: str = "") -> str | None:
    """Sets and returns the instruction set that the CPU kernels use.

    Args:
        path: of the loaded library.
        at_most: "avx512", "avx2" or "baseline", the widest that is allowed; empty changes nothing.

    Returns:
        the widest allowed instruction set that this processor has; None, with nothing changed, if the library has none named `at_most`.
    """
    function = ctypes.CDLL(str(path)).syncbn_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    name = function(at_most.encode() or None)
    return name.decode() if name else None
