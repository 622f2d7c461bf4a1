"""AscendCL's calls for virtual memory, through the module `acl` that CANN brings.

The module is imported when a driver is made (a package of that name in the package index is
another thing). A thread's first call makes the device its own. What is mapped can be touched at
once: AscendCL has no access apart from it. Names and arguments are those of CANN 8's published
interface; none of this has run on an NPU.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from xllm.errors import DependencyError, EngineError

# Of acl_rt.h; the module has no names for them.
_PINNED = 0
_NO_HANDLE = 0
_DEVICE_LOCATION = 1
_HUGE_PAGES = 4
_SMALLEST = 0
_HUGE_RANGE = 1

_HUGE_PAGE_BYTES = 2 << 20
_SUCCESS = 0


class AscendDriver:
    """Implements DeviceDriver for an Ascend NPU."""

    unmaps_runs = False

    def __init__(self, device: torch.device, api: Any = None, torch_api: Any = None) -> None:
        """`api`: the module acl, `torch_api`: torch_npu._C, or what behaves like them.
        DependencyError without CANN; EngineError where the device has no virtual memory."""
        self._api = _import_api() if api is None else api
        self._torch_api = torch_api
        self._device = device
        self._thread = threading.local()
        self._properties = {
            "handleType": _NO_HANDLE,
            "allocationType": _PINNED,
            "memAttr": _HUGE_PAGES,
            "location": {"id": device.index, "type": _DEVICE_LOCATION},
            "reserve": 0,
        }
        if hasattr(self._api.rt, "mem_get_allocation_granularity"):
            found = self._here(
                "mem_get_allocation_granularity",
                self._api.rt.mem_get_allocation_granularity,
                self._properties,
                _SMALLEST,
            )
        else:
            found = _HUGE_PAGE_BYTES  # of a CANN that has no call for it
        self.granularity = int(found)

    def reserve(self, num_bytes: int) -> int:
        """See DeviceDriver."""
        return int(
            self._here(
                "reserve_mem_address",
                self._api.rt.reserve_mem_address,
                num_bytes,
                0,
                0,
                _HUGE_RANGE,
            )
        )

    def free_range(self, address: int, num_bytes: int) -> None:
        """See DeviceDriver. The length is the driver's own knowledge."""
        del num_bytes
        self._here("release_mem_address", self._api.rt.release_mem_address, address)

    def create(self, num_bytes: int) -> int:
        """See DeviceDriver."""
        return int(
            self._here(
                "malloc_physical", self._api.rt.malloc_physical, num_bytes, self._properties, 0
            )
        )

    def release(self, handle: int) -> None:
        """See DeviceDriver."""
        self._here("free_physical", self._api.rt.free_physical, handle)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """See DeviceDriver."""
        self._here("map_mem", self._api.rt.map_mem, address, num_bytes, 0, handle, 0)

    def unmap(self, address: int, num_bytes: int) -> None:
        """See DeviceDriver. The length is the driver's own knowledge."""
        del num_bytes
        self._here("unmap_mem", self._api.rt.unmap_mem, address)

    def set_access(self, address: int, num_bytes: int) -> None:
        """See DeviceDriver. There is nothing to do."""

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """See DeviceDriver."""
        if self._torch_api is None:
            self._torch_api = importlib.import_module("torch_npu")._C
        make_storage = self._torch_api._construct_storage_from_data_pointer
        shape = {
            "nbytes": num_bytes,
            "data_ptr": address,
            "size": torch.Size([num_bytes]),
            "stride": (1,),
            "dtype": torch.uint8,
            "device": self._device,
            "storage_offset": 0,
        }
        make_tensor = self._torch_api._construct_NPU_Tensor_From_Storage_And_Metadata
        made: torch.Tensor = make_tensor(shape, make_storage(address, self._device, num_bytes))
        return made

    def _here(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """A call for this device."""
        if not getattr(self._thread, "has_device", False):
            self._call("set_device", self._api.rt.set_device, self._device.index)
            self._thread.has_device = True
        return self._call(name, function, *args)

    def _call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives beside its status, which comes last or alone."""
        answer = function(*args)
        *found, status = answer if isinstance(answer, tuple) else (answer,)
        if status != _SUCCESS:
            raise EngineError(f"acl.rt.{name}: error {status}{self._reason()}")
        return found[0] if found else None

    def _reason(self) -> str:
        text = self._api.get_recent_err_msg()
        return f" ({text})" if text else ""


def _import_api() -> Any:
    try:
        api = importlib.import_module("acl")
    except ImportError as error:
        raise DependencyError(
            f"virtual memory of an NPU needs the module acl of CANN, whose environment is not set "
            f"up here ({error})"
        ) from error
    if not hasattr(api, "rt"):
        raise DependencyError(
            f"the module acl at {getattr(api, '__file__', '?')} is not that of CANN"
        )
    return api
