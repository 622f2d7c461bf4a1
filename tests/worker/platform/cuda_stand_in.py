"""Stands in for the module cuda.bindings.driver: the functions go to a host's device, everything
else is the real module's, so that a name or a field that it does not have is an error.

Each function takes the real one's arguments and answers as it does: a tuple, the status first.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from tests.worker.platform.host_device import HostDevice, RefusedError

INDEX = 0


class CudaStandIn:
    """One device, of number INDEX, without a context until a thread sets it."""

    def __init__(self, api: Any, device: HostDevice) -> None:
        """`api`: the real module, which loads no driver before a function is called."""
        self.device = device
        self.used: set[str] = set()
        self.has_virtual_memory = True
        self._api = api
        self._is_begun = False
        self._thread = threading.local()
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._api, name)  # AttributeError: there is no such name
        self.used.add(name)
        if not name.startswith("cu"):
            return real
        own = getattr(self, f"_{name}", None)
        assert own is not None, f"{name} is not stood in for"
        signature = inspect.signature(real)

        def call(*args: Any) -> tuple[Any, ...]:
            signature.bind(*args)
            return own(*args)

        return call

    def _cuInit(self, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        self._is_begun = True
        return (self._api.CUresult.CUDA_SUCCESS,)

    def _cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        results = self._api.CUresult
        if not self._is_begun:
            return results.CUDA_ERROR_NOT_INITIALIZED, None
        if ordinal != INDEX:
            return results.CUDA_ERROR_INVALID_DEVICE, None
        return results.CUDA_SUCCESS, self._api.CUdevice(ordinal)

    def _cuDeviceGetAttribute(self, name: Any, device: Any) -> tuple[Any, ...]:
        attributes = self._api.CUdevice_attribute
        assert name == attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        assert int(device) == INDEX
        return self._api.CUresult.CUDA_SUCCESS, int(self.has_virtual_memory)

    def _cuDevicePrimaryCtxRetain(self, device: Any) -> tuple[Any, ...]:
        assert int(device) == INDEX
        return self._api.CUresult.CUDA_SUCCESS, self._api.CUcontext(77)

    def _cuCtxSetCurrent(self, context: Any) -> tuple[Any, ...]:
        assert int(context) == 77
        self._thread.is_current = True
        self.threads.add(threading.get_ident())
        return (self._api.CUresult.CUDA_SUCCESS,)

    def _cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> tuple[Any, ...]:
        self._check_properties(properties)
        names = self._api.CUmemAllocationGranularity_flags
        assert option == names.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return self._api.CUresult.CUDA_SUCCESS, self.device.granularity

    def _cuMemAddressReserve(
        self, size: int, alignment: int, address: int, flags: int
    ) -> tuple[Any, ...]:
        assert alignment in (0, self.device.granularity)
        assert (address, flags) == (0, 0)
        return self._done(self.device.reserve, size, gives=self._api.CUdeviceptr)

    def _cuMemAddressFree(self, address: Any, size: int) -> tuple[Any, ...]:
        return self._done(self.device.free_range, int(address), size)

    def _cuMemCreate(self, size: int, properties: Any, flags: int) -> tuple[Any, ...]:
        self._check_properties(properties)
        assert flags == 0
        gives = self._api.CUmemGenericAllocationHandle
        return self._done(self.device.create, size, gives=gives)

    def _cuMemRelease(self, handle: Any) -> tuple[Any, ...]:
        return self._done(self.device.release, int(handle))

    def _cuMemMap(
        self, address: Any, size: int, offset: int, handle: Any, flags: int
    ) -> tuple[Any, ...]:
        assert (offset, flags) == (0, 0)
        return self._done(self.device.map, int(address), size, int(handle))

    def _cuMemUnmap(self, address: Any, size: int) -> tuple[Any, ...]:
        return self._done(self.device.unmap, int(address), size)

    def _cuMemSetAccess(
        self, address: Any, size: int, descriptions: Any, count: int
    ) -> tuple[Any, ...]:
        assert len(descriptions) == count == 1
        one = descriptions[0]
        assert isinstance(one, self._api.CUmemAccessDesc)
        assert one.flags == self._api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._check_location(one.location)
        return self._done(self.device.set_access, int(address), size)

    def _check_properties(self, properties: Any) -> None:
        assert isinstance(properties, self._api.CUmemAllocationProp)
        pinned = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert properties.type == pinned
        self._check_location(properties.location)

    def _check_location(self, location: Any) -> None:
        assert location.type == self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        assert location.id == INDEX

    def _done(
        self, call: Callable[..., Any], *args: int, gives: Callable[[int], Any] | None = None
    ) -> tuple[Any, ...]:
        results = self._api.CUresult
        nothing = () if gives is None else (None,)
        if not getattr(self._thread, "is_current", False):
            return results.CUDA_ERROR_INVALID_CONTEXT, *nothing
        try:
            found = call(*args)
        except RefusedError as error:
            return getattr(results, f"CUDA_ERROR_{error}"), *nothing
        return (results.CUDA_SUCCESS,) if gives is None else (results.CUDA_SUCCESS, gives(found))
