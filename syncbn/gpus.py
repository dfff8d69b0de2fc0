"""The GPUs that this process can use, from the driver's management library (NVML): to ask CUDA would initialize CUDA in this process, and
processes forked from it could then not use CUDA."""

from __future__ import annotations

import ctypes
import functools

from . import environment

# What `Nvml.devices` calls: old drivers lack some of these.
_NEEDED = "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetCudaComputeCapability"


class Nvml:
    """libnvidia-ml.so.1. Its functions return 0 on success, and write their result through a pointer.

    Raises:
        OSError: the library is not installed, or finds no driver.
        AttributeError: the library is too old to have one of the functions that are needed.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        for function in _NEEDED:
            getattr(self.library, function)
        if self.library.nvmlInit_v2():
            raise OSError("nvmlInit_v2")

    def driver_version(self) -> int:
        """The newest CUDA that the driver supports, 1000 * major + 10 * minor, such as 13000; 0 if NVML does not report it."""
        ask, version = getattr(self.library, "nvmlSystemGetCudaDriverVersion_v2", None), ctypes.c_int()
        return 0 if ask is None or ask(ctypes.byref(version)) else version.value

    def devices(self) -> list[tuple[str, int]]:
        """Each GPU in the order of the PCI bus: its UUID, such as GPU-8932f937-..., and its compute capability, 10 * major + minor."""
        count = ctypes.c_uint()
        if self.library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        devices = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if self.library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
                devices.append((self._uuid(handle), self._capability(handle)))
        return devices

    def capability_of(self, uuid: str) -> int | None:
        """The compute capability of the GPU that contains the MIG instance `uuid`; None if there is no such instance."""
        instance, gpu = ctypes.c_void_p(), ctypes.c_void_p()
        if self.library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(instance)):
            return None
        if self.library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance, ctypes.byref(gpu)):
            return None
        return self._capability(gpu)

    def _uuid(self, handle: ctypes.c_void_p) -> str:
        text = ctypes.create_string_buffer(96)
        return "" if self.library.nvmlDeviceGetUUID(handle, text, 96) else text.value.decode()

    def _capability(self, handle: ctypes.c_void_p) -> int:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        return 10 * major.value + minor.value


@functools.cache
def nvml() -> Nvml | None:
    """The management library; None on a machine that has no usable one."""
    try:
        return Nvml()
    except (OSError, AttributeError):
        return None


def driver_version() -> int:
    """`Nvml.driver_version`; 0 without NVML."""
    driver = nvml()
    return driver.driver_version() if driver else 0


def capabilities() -> tuple[int, ...] | None:
    """The compute capability of each GPU that CUDA_VISIBLE_DEVICES leaves, or may leave, to this process; None without NVML.

    How CUDA reads the variable: CUDA C++ Programming Guide, "CUDA Environment Variables"."""
    driver = nvml()
    if driver is None:
        return None
    devices, visible = driver.devices(), environment.visible_devices()
    if visible is None:
        return tuple(capability for _, capability in devices)
    # By default CUDA numbers the GPUs from the fastest to the slowest, an order that NVML does not have: a number may mean any of them.
    ordered = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({capability for _, capability in devices}) == 1
    found: list[int] = []
    for name in (part.strip() for part in visible.split(",")):
        meant = _meant(driver, devices, name, ordered)
        if not meant:  # CUDA, too, ignores what follows an entry that names no GPU
            break
        found += meant
    return tuple(found)


def _meant(driver: Nvml, devices: list[tuple[str, int]], name: str, ordered: bool) -> list[int]:
    """The compute capabilities of the GPUs that one entry of CUDA_VISIBLE_DEVICES may mean.

    Args:
        devices: those of `Nvml.devices`.
        name: the entry: a number, a UUID, or the UUID of a MIG instance.
        ordered: whether a number is an index into `devices`.
    """
    if name.isdecimal():
        if int(name) >= len(devices):
            return []
        return [devices[int(name)][1]] if ordered else [capability for _, capability in devices]
    if name.startswith("MIG-") and not name.startswith("MIG-GPU-"):
        capability = driver.capability_of(name)
        return [] if capability is None else [capability]
    # Drivers before 470 name a MIG instance MIG-GPU-<uuid>/<instance>/<instance>. CUDA accepts the beginning of a UUID.
    uuid = name.removeprefix("MIG-").partition("/")[0]
    return [capability for full, capability in devices if uuid.startswith("GPU-") and full.startswith(uuid)]
