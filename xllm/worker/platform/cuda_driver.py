"""CUDA's driver API for virtual memory, through the package cuda-bindings.

The package is imported when a driver is made. A call needs the device's context to be the calling
thread's, also that of a thread that torch has never seen: it is made so at a thread's first call.
The context is the device's primary one, which torch computes in, too; it lives as long as the
process.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from xllm.errors import DependencyError, EngineError


class CudaDriver:
    """Implements DeviceDriver for an NVIDIA GPU."""

    unmaps_runs = True

    def __init__(self, device: torch.device, api: Any = None) -> None:
        """`api`: cuda.bindings.driver, or what behaves like it. DependencyError without the
        package or the driver; EngineError where the device has no virtual memory."""
        self._api = _import_api() if api is None else api
        self._device = device
        self._thread = threading.local()
        try:
            self._call("cuInit", self._api.cuInit, 0)
        except RuntimeError as error:  # the package is there and no driver
            raise DependencyError(f"the CUDA driver does not load: {error}") from error
        number = self._call("cuDeviceGet", self._api.cuDeviceGet, device.index)
        names = self._api.CUdevice_attribute
        wanted = names.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call("cuDeviceGetAttribute", self._api.cuDeviceGetAttribute, wanted, number):
            raise EngineError(f"{device} has no virtual memory management")
        self._context = self._call(
            "cuDevicePrimaryCtxRetain", self._api.cuDevicePrimaryCtxRetain, number
        )
        self._location = self._api.CUmemLocation()
        self._location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = device.index
        self._properties = self._api.CUmemAllocationProp()
        self._properties.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = self._location
        self._access = self._api.CUmemAccessDesc()
        self._access.location = self._location
        self._access.flags = self._api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        smallest = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = self._here(
            "cuMemGetAllocationGranularity",
            self._api.cuMemGetAllocationGranularity,
            self._properties,
            smallest,
        )
        self.granularity = int(granularity)

    def reserve(self, num_bytes: int) -> int:
        """See DeviceDriver."""
        return int(
            self._here(
                "cuMemAddressReserve",
                self._api.cuMemAddressReserve,
                num_bytes,
                self.granularity,
                0,
                0,
            )
        )

    def free_range(self, address: int, num_bytes: int) -> None:
        """See DeviceDriver."""
        self._here("cuMemAddressFree", self._api.cuMemAddressFree, address, num_bytes)

    def create(self, num_bytes: int) -> int:
        """See DeviceDriver."""
        return int(self._here("cuMemCreate", self._api.cuMemCreate, num_bytes, self._properties, 0))

    def release(self, handle: int) -> None:
        """See DeviceDriver."""
        self._here("cuMemRelease", self._api.cuMemRelease, handle)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """See DeviceDriver."""
        self._here("cuMemMap", self._api.cuMemMap, address, num_bytes, 0, handle, 0)

    def unmap(self, address: int, num_bytes: int) -> None:
        """See DeviceDriver."""
        self._here("cuMemUnmap", self._api.cuMemUnmap, address, num_bytes)

    def set_access(self, address: int, num_bytes: int) -> None:
        """See DeviceDriver."""
        self._here(
            "cuMemSetAccess", self._api.cuMemSetAccess, address, num_bytes, [self._access], 1
        )

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """See DeviceDriver."""
        return torch.as_tensor(AddressedBytes(address, num_bytes), device=self._device)

    def _here(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """A call in the device's context."""
        if not getattr(self._thread, "has_context", False):
            self._call("cuCtxSetCurrent", self._api.cuCtxSetCurrent, self._context)
            self._thread.has_context = True
        return self._call(name, function, *args)

    def _call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives beside its status: nothing, or one thing."""
        status, *found = function(*args)
        if status != self._api.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name}: {getattr(status, 'name', status)}")
        return found[0] if found else None


class AddressedBytes:
    """Bytes at an address, as torch takes them from other libraries (version 3 of the CUDA array
    interface). No 16-bit float has a name there: they are bytes, and seen as others behind it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }


def _import_api() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DependencyError(
            f"virtual memory of a GPU needs the package cuda-bindings ({error}); install it with: "
            'pip install ".[gpu]" in the directory of xLLM'
        ) from error
