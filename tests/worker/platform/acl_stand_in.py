"""Stands in for the module `acl` of CANN: its functions for virtual memory, with the arguments and
the answers of the published interface (C++: acl_rt.h of CANN 8; Python: the pyACL reference), over
a host's device.

No device and no CANN is needed; what it takes for granted is what those pages say, not what an NPU
was seen to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tests.worker.platform.host_device import OUT_OF_MEMORY, HostDevice, RefusedError

INDEX = 0
CODES = {OUT_OF_MEMORY: 207001}
INVALID_CODE = 107000


class AclStandIn:
    """The module; `rt` is its submodule."""

    def __init__(self, device: HostDevice) -> None:
        self.rt = _Runtime(device)
        self.message = ""

    def get_recent_err_msg(self) -> str:
        return self.message


class _Runtime:
    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.threads: set[int] = set()

    def set_device(self, index: int) -> int:
        assert index == INDEX
        self.threads.add(threading.get_ident())
        return 0

    def mem_get_allocation_granularity(self, properties: Any, option: int) -> tuple[int, int]:
        self._check(properties)
        assert option == 0  # ACL_RT_MEM_ALLOC_GRANULARITY_MINIMUM
        return self.device.granularity, 0

    def reserve_mem_address(
        self, size: int, alignment: int, expected: int, flags: int
    ) -> tuple[int, int]:
        # Huge pages, as the physical memory behind it.
        assert (alignment, expected, flags) == (0, 0, 1)
        return self._gave(self.device.reserve, size)

    def release_mem_address(self, address: int) -> int:
        return self._gave(self.device.free_range, address, None)[1]

    def malloc_physical(self, size: int, properties: Any, flags: int) -> tuple[int, int]:
        self._check(properties)
        assert flags == 0
        return self._gave(self.device.create, size)

    def free_physical(self, handle: int) -> int:
        return self._gave(self.device.release, handle)[1]

    def map_mem(self, address: int, size: int, offset: int, handle: int, flags: int) -> int:
        assert (offset, flags) == (0, 0)
        status = self._gave(self.device.map, address, size, handle)[1]
        return status or self._gave(self.device.set_access, address, size)[1]

    def unmap_mem(self, address: int) -> int:
        return self._gave(self.device.unmap, address, None)[1]

    def _check(self, properties: Any) -> None:
        assert set(properties) == {"handleType", "allocationType", "memAttr", "location", "reserve"}
        assert properties["handleType"] == properties["allocationType"] == 0
        assert properties["memAttr"] == 4  # ACL_HBM_MEM_HUGE
        assert properties["location"] == {"id": INDEX, "type": 1}  # on a device

    def _gave(self, call: Callable[..., Any], *args: int | None) -> tuple[int, int]:
        assert threading.get_ident() in self.threads, "no device was set in this thread"
        try:
            return call(*args) or 0, 0
        except RefusedError as error:
            return 0, CODES.get(str(error), INVALID_CODE)
