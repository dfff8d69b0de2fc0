"""Which GPUs a process can use, by CUDA's rules for CUDA_VISIBLE_DEVICES, without asking CUDA."""

from __future__ import annotations

import re

import pytest

from syncbn import gpus

pytestmark = pytest.mark.world_size(1)
UUIDS = ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000", "GPU-bbcc3333-0000"]
CAPABILITIES = [75, 90, 90]


class Library:
    """The functions of libnvidia-ml.so.1, for a Turing and two Hoppers, the first of which has a MIG instance. 0 is success."""

    def __init__(self, capabilities):
        self.capabilities = capabilities

    def nvmlInit_v2(self):
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, version):
        version._obj.value = 13000
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, handle, text, size):
        text.value = UUIDS[handle.value - 1].encode()
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        handle._obj.value = 100
        return 0 if uuid == b"MIG-0123" else 6

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance, handle):
        handle._obj.value = 2
        return 0 if instance.value == 100 else 2

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = divmod(self.capabilities[handle.value - 1], 10)
        return 0


@pytest.fixture
def driver(monkeypatch):
    def install(capabilities=CAPABILITIES):
        monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: Library(capabilities))
        gpus.nvml.cache_clear()

    yield install
    gpus.nvml.cache_clear()


VISIBLE = [
    # CUDA_VISIBLE_DEVICES, the capabilities if GPUs are numbered in the order of the bus, and those otherwise
    (None, (75, 90, 90), (75, 90, 90)),
    ("", (), ()),
    ("-1", (), ()),
    ("NoDevFiles", (), ()),
    ("1", (90,), (75, 90, 90)),  # CUDA numbers the fastest first, by its own judgement: any may be meant
    (" 2 , 0", (90, 75), (75, 90, 90, 75, 90, 90)),
    ("0,7,1", (75,), (75, 90, 90)),  # a wrong entry ends the list
    ("7,0", (), ()),
    ("GPU-bbcc3333-0000", (90,), (90,)),
    ("GPU-aaaa,GPU-bbcc", (75, 90), (75, 90)),  # the beginning of a UUID is enough
    ("GPU-cccc,GPU-aaaa", (), ()),
    ("MIG-0123", (90,), (90,)),
    ("MIG-4567", (), ()),
    ("MIG-GPU-aaaa1111-0000/1/0", (75,), (75,)),  # before driver 470
]


@pytest.mark.parametrize("order", ["PCI_BUS_ID", None])
@pytest.mark.parametrize("visible,by_bus,otherwise", VISIBLE, ids=[repr(row[0]) for row in VISIBLE])
def test_only_the_visible_gpus_count(monkeypatch, driver, visible, by_bus, otherwise, order):
    driver()
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert gpus.capabilities() == (by_bus if order else otherwise)


def test_the_order_of_equal_gpus_does_not_matter(monkeypatch, driver):
    driver([90, 90, 90])
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus.capabilities() == (90,) and gpus.driver_version() == 13000


def test_without_the_management_library_nothing_is_known(monkeypatch, driver):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(gpus.ctypes, "CDLL", missing)
    gpus.nvml.cache_clear()
    assert gpus.capabilities() is None and gpus.driver_version() == 0


@pytest.mark.parametrize("function", [name for name in vars(Library) if re.match(r"nvmlDevice(?!.*(Mig|ByUUID))", name)])
def test_a_management_library_that_lacks_a_function_tells_nothing(monkeypatch, driver, function):
    monkeypatch.delattr(Library, function)
    driver()
    assert gpus.capabilities() is None and gpus.driver_version() == 0
