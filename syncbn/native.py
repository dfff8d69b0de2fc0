"""Finds the compiled libraries beside this file and loads them, or says why not; then the reference runs on that device.

SYNCBN_NATIVE=0 turns both off; SYNCBN_CPU_ISA is the widest instruction set that the CPU kernels use.
"""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import environment

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


def status() -> tuple[Library, ...]:
    """What was loaded for each device type, and why not."""
    return load()


@functools.cache
def load() -> tuple[Library, ...]:
    """Loads what can be loaded, once. Warns if nothing compiled runs on the device that this machine would use."""
    libraries = (_load("cpu", _why_not_cpu), _load("cuda", _why_not_cuda))
    device = "cuda" if torch.version.cuda and _gpu_capabilities() else "cpu"
    for library in libraries:
        if library.device == device and not library.loaded and not _turned_off():
            warnings.warn(f"syncbn runs its slower reference on {device}: {library.reason}", FallbackWarning, stacklevel=2)
    return libraries


def _load(device: str, why_not) -> Library:
    path = FOLDER / f"libsyncbn_{device}.so"
    reason = why_not(path)
    if reason:
        return Library(device, path, False, reason)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Library(device, path, False, f"{path.name} was built for another torch than {torch.__version__} ({error}): {REBUILD}")
    return Library(device, path, True, _cpu_isa(path) if device == "cpu" else f"compiled for sm {_built_for(path, 'archs')}")


def _turned_off() -> bool:
    return not environment.settings.native


def _why_not_cpu(path: Path) -> str:
    if _turned_off():
        return "turned off by SYNCBN_NATIVE=0"
    if not path.exists():
        return f"{path.name} was not built; with a C++ compiler at hand, {REBUILD}"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return f"{path.name} needs torch 2.11 or newer, this is {torch.__version__}: update torch"
    return ""


def _why_not_cuda(path: Path) -> str:
    if not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA"
    capabilities = _gpu_capabilities()
    if not capabilities and not torch.cuda.is_available():
        return "no GPU is visible"
    reason = _why_not_cpu(path).replace("a C++ compiler", "nvcc")
    if reason:
        return reason
    built, version, driver = _built_for(path, "archs"), _built_for(path, "version"), _driver_version()
    if driver and version and driver // 1000 < int(version) // 1000:
        needs, has = (f"{number // 1000}.{number % 1000 // 10}" for number in (int(version), driver))
        return f"{path.name} was built with CUDA {needs}, this driver is for {has}: update it, or {REBUILD} with an nvcc of that version"
    if capabilities and built and not any(_runs(built, capability) for capability in capabilities):
        gpu = "/".join(f"sm_{capability}" for capability in sorted(set(capabilities)))
        return f"{path.name} has code for sm {built}, this GPU is {gpu}: set TORCH_CUDA_ARCH_LIST and {REBUILD}"
    return ""


def _built_for(path: Path, what: str) -> str:
    """The "archs" such as "75 80 90 120+PTX", or the "version" of CUDA such as "13000": csrc/build_info.cpp leaves them in the file,
    which must be read before it is loaded."""
    found = re.search(rf"syncbn-cuda-{what}=([^;]*);".encode(), path.read_bytes())
    return found.group(1).decode() if found else ""


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


@functools.cache
def _nvml() -> ctypes.CDLL | None:
    """The driver's management library: asking CUDA would initialize it, and forks could not use it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if nvml.nvmlInit_v2() else nvml


def _driver_version() -> int:
    """Of the newest CUDA that the driver runs, such as 13000; 0 if it does not say."""
    ask, version = getattr(_nvml(), "nvmlSystemGetCudaDriverVersion_v2", None), ctypes.c_int()
    return 0 if ask is None or ask(ctypes.byref(version)) else version.value


@functools.cache
def _gpu_capabilities() -> tuple[int, ...]:
    """Such as (90, 90)."""
    nvml = _nvml()
    count, handle, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
            nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
            found.append(10 * major.value + minor.value)
    return tuple(found)


def _cpu_isa(path: Path) -> str:
    at_most = environment.settings.cpu_isa
    name = cpu_isa(path, at_most)
    if name is None:
        raise ValueError(f"SYNCBN_CPU_ISA must be avx512, avx2 or baseline, got {at_most!r}")
    return f"uses {name}"


def cpu_isa(path: Path, at_most: str = "") -> str | None:
    """The instruction set that the CPU kernels use, after limiting it to `at_most`; None if the library has none of that name."""
    function = ctypes.CDLL(str(path)).syncbn_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    name = function(at_most.encode() or None)
    return name.decode() if name else None
