"""The drivers of CUDA and AscendCL over stand-ins for their modules: every name, field and
argument is one that the published interface has, and every refusal is told by its name.

cuda.bindings.driver itself is what the stand-in looks names up in: its functions' signatures, its
structures and its enumerations are real, and nothing of it calls a device.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.worker.platform.acl_stand_in import AclStandIn
from tests.worker.platform.cuda_stand_in import CudaStandIn
from tests.worker.platform.host_device import FakeDriver, HostDevice
from xllm.errors import DependencyError, EngineError, XllmError
from xllm.worker.platform.ascend_driver import AscendDriver
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.cuda import CudaPlatform
from xllm.worker.platform.cuda_driver import AddressedBytes, CudaDriver
from xllm.worker.platform.device_driver import DeviceDriver
from xllm.worker.platform.npu import NpuPlatform

UNIT = 8192
GPU = torch.device("cuda", 0)
NPU = torch.device("privateuseone", 0)  # what torch calls an NPU until torch_npu is there


def cuda_stand_in(device: HostDevice) -> CudaStandIn:
    api = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    return CudaStandIn(api, device)


DRIVERS: dict[str, Callable[[HostDevice], DeviceDriver]] = {
    "fake": FakeDriver,
    "cuda": lambda device: CudaDriver(GPU, cuda_stand_in(device)),
    "ascend": lambda device: AscendDriver(NPU, AclStandIn(device)),
}


@pytest.fixture
def device() -> HostDevice:
    return HostDevice(granularity=UNIT, total_bytes=4 * UNIT, address_bytes=64 * UNIT)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, device: HostDevice) -> DeviceDriver:
    return DRIVERS[request.param](device)


def test_memory_is_made_mapped_touched_and_given_back(
    driver: DeviceDriver, device: HostDevice
) -> None:
    assert driver.granularity == UNIT
    base = driver.reserve(8 * UNIT)
    one, other = driver.create(UNIT), driver.create(2 * UNIT)
    assert device.used_bytes == 3 * UNIT
    driver.map(base + UNIT, UNIT, one)
    driver.map(base + 2 * UNIT, 2 * UNIT, other)
    driver.map(base + 6 * UNIT, UNIT, one)
    driver.set_access(base + UNIT, 3 * UNIT)
    driver.set_access(base + 6 * UNIT, UNIT)
    assert not device.can_touch(base, 1)
    assert device.can_touch(base + UNIT, 3 * UNIT)
    driver.release(one)
    driver.release(other)
    assert device.used_bytes == 3 * UNIT  # what maps a memory keeps it
    driver.unmap(base + 6 * UNIT, UNIT)
    if driver.unmaps_runs:
        driver.unmap(base + UNIT, 3 * UNIT)
    else:
        driver.unmap(base + UNIT, UNIT)
        driver.unmap(base + 2 * UNIT, 2 * UNIT)
    assert device.used_bytes == 0
    assert not device.can_touch(base + UNIT, 1)
    driver.free_range(base, 8 * UNIT)
    assert device.left() == (0, 0, 0)


def test_what_a_device_refuses_changes_nothing_and_has_a_name(
    driver: DeviceDriver, device: HostDevice
) -> None:
    base = driver.reserve(4 * UNIT)
    one, two = driver.create(UNIT), driver.create(2 * UNIT)
    driver.map(base, UNIT, one)
    driver.map(base + 2 * UNIT, 2 * UNIT, two)
    refused: list[Callable[[], object]] = [
        lambda: driver.map(base, UNIT, one),  # something is there
        lambda: driver.map(base + UNIT, 2 * UNIT, two),  # its second half is taken
        lambda: driver.map(base + UNIT, UNIT // 2, one),
        lambda: driver.map(base + UNIT + 8, UNIT, one),
        lambda: driver.map(base + 4 * UNIT, UNIT, one),  # outside
        lambda: driver.map(base + UNIT, UNIT, 5),  # no such handle
        lambda: driver.unmap(base + 3 * UNIT, UNIT),  # the second half of a mapping
        lambda: driver.unmap(base + UNIT, UNIT),  # nothing is there
        lambda: driver.free_range(base, 4 * UNIT),  # something is there
        lambda: driver.free_range(base + UNIT, UNIT),
        lambda: driver.create(UNIT // 2),
        lambda: driver.create(2 * UNIT),  # out of memory
        lambda: driver.reserve(61 * UNIT),  # out of addresses
        lambda: driver.release(5),
    ]
    before = device.left()
    for call in refused:
        with pytest.raises(EngineError):
            call()
    assert device.left() == before
    driver.release(two)
    with pytest.raises(EngineError):
        driver.release(two)
    with pytest.raises(EngineError):
        driver.map(base + UNIT, UNIT, two)


def test_cuda_gives_no_access_by_itself_and_unmaps_no_half_of_a_mapping(device: HostDevice) -> None:
    driver = CudaDriver(GPU, cuda_stand_in(device))
    base, two = driver.reserve(4 * UNIT), driver.create(2 * UNIT)
    with pytest.raises(EngineError, match=r"^cuMemSetAccess: CUDA_ERROR_INVALID_VALUE$"):
        driver.set_access(base, UNIT)
    driver.map(base, 2 * UNIT, two)
    assert not device.can_touch(base, 1)
    with pytest.raises(EngineError, match=r"^cuMemUnmap: CUDA_ERROR_INVALID_VALUE$"):
        driver.unmap(base, UNIT)
    with pytest.raises(EngineError, match=r"^cuMemMap: CUDA_ERROR_INVALID_VALUE$"):
        driver.map(base + UNIT, 2 * UNIT, two)
    with pytest.raises(EngineError, match=r"^cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY$"):
        driver.create(3 * UNIT)
    driver.set_access(base, 2 * UNIT)
    assert device.can_touch(base, 2 * UNIT)


def test_cuda_calls_are_those_of_the_published_interface(device: HostDevice) -> None:
    api = cuda_stand_in(device)
    driver = CudaDriver(GPU, api)
    base, one = driver.reserve(UNIT), driver.create(UNIT)
    driver.map(base, UNIT, one)
    driver.set_access(base, UNIT)
    driver.unmap(base, UNIT)
    driver.release(one)
    driver.free_range(base, UNIT)
    assert {name for name in api.used if name.startswith("cu")} == {
        "cuInit",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuMemGetAllocationGranularity",
        "cuMemAddressReserve",
        "cuMemAddressFree",
        "cuMemCreate",
        "cuMemRelease",
        "cuMemMap",
        "cuMemUnmap",
        "cuMemSetAccess",
    }
    # As torch takes it: https://numba.readthedocs.io, "CUDA Array Interface (Version 3)".
    described = AddressedBytes(base, UNIT).__cuda_array_interface__
    assert described["data"] == (base, False)
    assert (described["shape"], described["typestr"]) == ((UNIT,), "|u1")
    assert (described["version"], described["strides"]) == (3, None)


def test_the_context_is_made_current_in_every_thread_that_calls(device: HostDevice) -> None:
    cuda, acl = cuda_stand_in(device), AclStandIn(device)
    for driver, threads in (
        (CudaDriver(GPU, cuda), cuda.threads),
        (AscendDriver(NPU, acl), acl.rt.threads),
    ):
        base = driver.reserve(UNIT)
        one = driver.create(UNIT)
        failed: list[BaseException] = []

        def map_there(driver: DeviceDriver = driver, base: int = base, one: int = one) -> None:
            try:
                driver.map(base, UNIT, one)
                driver.set_access(base, UNIT)
                driver.unmap(base, UNIT)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=map_there)
        thread.start()
        thread.join()
        assert failed == []
        assert threads == {threading.get_ident(), thread.ident}


def test_a_device_without_virtual_memory_and_one_that_is_not_there(device: HostDevice) -> None:
    api = cuda_stand_in(device)
    with pytest.raises(EngineError, match=r"^cuDeviceGet: CUDA_ERROR_INVALID_DEVICE$"):
        CudaDriver(torch.device("cuda", 1), api)
    api.has_virtual_memory = False
    with pytest.raises(EngineError, match="cuda:0 has no virtual memory management"):
        CudaDriver(GPU, api)


def test_errors_of_acl_carry_their_number_and_the_devices_words(device: HostDevice) -> None:
    api = AclStandIn(device)
    driver = AscendDriver(NPU, api)
    with pytest.raises(EngineError, match=r"^acl\.rt\.malloc_physical: error 207001$"):
        driver.create(5 * UNIT)
    api.message = "E19999: too much"
    with pytest.raises(EngineError, match=r"error 107000 \(E19999: too much\)$"):
        driver.release(1)


@pytest.mark.parametrize("version", ["2.7.1", "2.14.0"])
def test_acls_arguments_are_those_of_the_c_interface(version: str, device: HostDevice) -> None:
    """The Python functions have the arguments of those of C (`npu_api.json`, of the headers that
    torch_npu's wheels bring), less the pointers that the answers are written to."""
    published = json.loads(Path(__file__).with_name("npu_api.json").read_text())[version]["acl"]
    runtime = AclStandIn(device).rt
    outputs = {
        "aclrtReserveMemAddress": 1,
        "aclrtMallocPhysical": 1,
        "aclrtMemGetAllocationGranularity": 1,
    }
    for name, types_of in published.items():
        words = re.sub("([A-Z])", r"_\1", name.removeprefix("aclrt")).lower().strip("_")
        own = inspect.signature(getattr(runtime, words)).parameters
        assert len(own) == len(types_of) - outputs.get(name, 0), name
    assert {"aclrtMapMem", "aclrtUnmapMem", "aclrtFreePhysical"} <= set(published)


def test_an_older_cann_has_pages_of_2_mib(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = AclStandIn(device)
    monkeypatch.delattr(type(api.rt), "mem_get_allocation_granularity")
    assert AscendDriver(NPU, api).granularity == 2 << 20


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DependencyError, match="cuda-bindings"):
        CudaDriver(GPU)
    monkeypatch.setitem(sys.modules, "acl", None)
    with pytest.raises(DependencyError, match="of CANN"):
        AscendDriver(NPU)
    monkeypatch.setitem(sys.modules, "acl", types.ModuleType("acl"))
    with pytest.raises(DependencyError, match="is not that of CANN"):
        AscendDriver(NPU)


def test_without_a_driver_the_real_package_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and a driver")
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    with pytest.raises(XllmError, match=r"driver|cuInit"):
        CudaDriver(GPU)
    assert importlib.import_module("cuda.bindings.driver") is not None


def test_platforms_know_their_drivers(monkeypatch: pytest.MonkeyPatch, device: HostDevice) -> None:
    assert CpuPlatform().virtual_driver() is None
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda_stand_in(device))
    cuda = object.__new__(CudaPlatform)  # as it is where torch sees a GPU
    cuda.device = GPU
    assert cuda.virtual_driver().granularity == UNIT
    monkeypatch.setitem(sys.modules, "acl", AclStandIn(device))
    npu = object.__new__(NpuPlatform)
    npu.device = NPU
    assert npu.virtual_driver().granularity == UNIT


def test_an_npu_tensor_is_made_of_a_storage_over_the_address(device: HostDevice) -> None:
    made = []

    class TorchNpu:
        def _construct_storage_from_data_pointer(self, *args: object) -> object:
            made.append(args)
            return "storage"

        def _construct_NPU_Tensor_From_Storage_And_Metadata(
            self, metadata: dict[str, object], storage: object
        ) -> torch.Tensor:
            assert storage == "storage"
            made.append(metadata)
            return torch.zeros(3)

    driver = AscendDriver(NPU, AclStandIn(device), TorchNpu())
    assert driver.tensor(4096, 100).shape == (3,)
    assert made[0] == (4096, NPU, 100)
    assert made[1]["data_ptr"] == 4096
    assert (made[1]["nbytes"], made[1]["size"], made[1]["stride"]) == (100, torch.Size([100]), (1,))
