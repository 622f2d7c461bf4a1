"""What virtual memory needs of a device's driver: calls, and no books of them."""

from __future__ import annotations

from typing import Protocol

import torch


class DeviceDriver(Protocol):
    """The calls on the physical and the virtual memory of one device. Addresses and lengths are
    bytes and multiples of `granularity`; any thread may call. EngineError with the call's name
    and the driver's own word where one is refused, which then changed nothing.

    No call waits for the device and none is ordered with its streams: who changes a mapping sees
    to it that nothing runs that touches it (see `PageMapper`)."""

    @property
    def granularity(self) -> int:
        """The smallest unit of physical memory and of mapping."""

    @property
    def unmaps_runs(self) -> bool:
        """Whether `unmap` takes several mappings that lie one behind the other; else one."""

    def reserve(self, num_bytes: int) -> int:
        """The address of a new range in which nothing is mapped: to touch it is a fault."""

    def free_range(self, address: int, num_bytes: int) -> None:
        """Give up a range, as it was reserved, in which nothing is mapped any more."""

    def create(self, num_bytes: int) -> int:
        """The handle of new physical memory, which may hold anything."""

    def release(self, handle: int) -> None:
        """Give up physical memory. It is the device's again once nothing maps it."""

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """Map the whole of a physical memory where nothing is mapped. To touch it is still a
        fault, until `set_access`."""

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take whole mappings away; the range stays reserved. See `unmaps_runs`."""

    def set_access(self, address: int, num_bytes: int) -> None:
        """Let the device read and write all of what is mapped there, without a gap."""

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 over the device's memory at an address. It owns nothing: whoever has
        it uses it only while something is mapped there."""
