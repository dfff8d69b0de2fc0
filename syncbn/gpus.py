"""The GPUs that this process can use, from the driver's management library: asking CUDA would initialize it, and forks could not use it."""

from __future__ import annotations

import ctypes
import functools

from . import environment


class Nvml:
    """libnvidia-ml.so.1. Its functions return 0 on success."""

    def __init__(self) -> None:
        """Raises OSError if it is not there or has no driver."""
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        if self.library.nvmlInit_v2():
            raise OSError("nvmlInit_v2")

    def driver_version(self) -> int:
        """Of the newest CUDA that the driver runs, such as 13000; 0 if it does not say."""
        ask, version = getattr(self.library, "nvmlSystemGetCudaDriverVersion_v2", None), ctypes.c_int()
        return 0 if ask is None or ask(ctypes.byref(version)) else version.value

    def devices(self) -> list[tuple[str, int]]:
        """UUID, such as GPU-8932f937-..., and compute capability, such as 90, of each GPU in the order of the bus."""
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
        """Of the GPU that has this MIG instance; None if there is no such instance."""
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
    try:
        return Nvml()
    except (OSError, AttributeError):  # AttributeError: older than the function
        return None


def driver_version() -> int:
    """Of the newest CUDA that the driver runs, such as 13000; 0 if it does not say."""
    driver = nvml()
    return driver.driver_version() if driver else 0


def capabilities() -> tuple[int, ...] | None:
    """Of each GPU that CUDA_VISIBLE_DEVICES leaves to this process, such as (90, 90); None if there is no management library to ask."""
    driver = nvml()
    if driver is None:
        return None
    devices, visible = driver.devices(), environment.visible_devices()
    if visible is None:
        return tuple(capability for _, capability in devices)
    # CUDA counts the fastest first unless told otherwise; any of them may be meant.
    ordered = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({capability for _, capability in devices}) == 1
    found: list[int] = []
    for name in (part.strip() for part in visible.split(",")):
        meant = _meant(driver, devices, name, ordered)
        if not meant:  # as for CUDA, a name without a GPU ends the list
            break
        found += meant
    return tuple(found)


def _meant(driver: Nvml, devices: list[tuple[str, int]], name: str, ordered: bool) -> list[int]:
    """The capabilities of the GPUs that an entry of CUDA_VISIBLE_DEVICES may mean."""
    if name.isdecimal():
        if int(name) >= len(devices):
            return []
        return [devices[int(name)][1]] if ordered else [capability for _, capability in devices]
    if name.startswith("MIG-") and not name.startswith("MIG-GPU-"):
        capability = driver.capability_of(name)
        return [] if capability is None else [capability]
    # Before driver 470 an instance is MIG-GPU-<uuid>/<instance>/<instance>. The beginning of a UUID is enough.
    uuid = name.removeprefix("MIG-").partition("/")[0]
    return [capability for full, capability in devices if uuid.startswith("GPU-") and full.startswith(uuid)]
