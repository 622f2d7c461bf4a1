"""The back-ends of VirtualMemory that one conformance suite runs over: the CPU's, and a device's
over a fake driver and over the real drivers, whose modules are stood in for."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Protocol

import pytest
import torch

from tests.worker.platform.acl_stand_in import AclStandIn
from tests.worker.platform.cuda_stand_in import CudaStandIn
from tests.worker.platform.host_device import FakeDriver, HostDevice
from xllm.worker.memory.device_virtual import DeviceBlocks, DeviceVirtualMemory
from xllm.worker.memory.virtual import CpuVirtualMemory, VirtualMemory
from xllm.worker.platform.ascend_driver import AscendDriver
from xllm.worker.platform.cuda_driver import CudaDriver
from xllm.worker.platform.device_driver import DeviceDriver

PAGE = mmap.PAGESIZE


class BackEnd(Protocol):
    """A physical memory of pages of PAGE bytes, its granularity, and virtual memory over it."""

    reads_zeros: bool
    """Whether what is not mapped reads as zeros; else to touch it is a fault."""

    def open(self) -> VirtualMemory:
        """One more virtual memory over the same physical one."""

    def physical(self, page: int, offset: int, count: int) -> bytes:
        """Read the physical memory."""

    def fill(self, page: int, data: bytes) -> None:
        """Write to the beginning of a physical page."""

    def close(self) -> None:
        """Give all up, and check that nothing is left."""


class CpuBackEnd:
    reads_zeros = True

    def __init__(self, num_pages: int) -> None:
        self.fd = os.memfd_create("pages", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, num_pages * PAGE)
        self._opened: list[CpuVirtualMemory] = []

    def open(self) -> VirtualMemory:
        self._opened.append(CpuVirtualMemory(self.fd))
        return self._opened[-1]

    def physical(self, page: int, offset: int, count: int) -> bytes:
        return os.pread(self.fd, count, page * PAGE + offset)

    def fill(self, page: int, data: bytes) -> None:
        os.pwrite(self.fd, data, page * PAGE)

    def close(self) -> None:
        for memory in self._opened:
            memory.close()
        os.close(self.fd)


class DeviceBackEnd:
    reads_zeros = False

    def __init__(self, num_pages: int) -> None:
        self.device = HostDevice(total_bytes=num_pages * PAGE)
        self.blocks = DeviceBlocks(self.driver(), num_pages, PAGE)
        self._opened: list[DeviceVirtualMemory] = []

    def driver(self) -> DeviceDriver:
        return FakeDriver(self.device)

    def open(self) -> VirtualMemory:
        self._opened.append(DeviceVirtualMemory(self.blocks))
        return self._opened[-1]

    def physical(self, page: int, offset: int, count: int) -> bytes:
        return self.device.peek(self.blocks.handle(page), offset, count)

    def fill(self, page: int, data: bytes) -> None:
        self.device.poke(self.blocks.handle(page), 0, data)

    def close(self) -> None:
        for memory in self._opened:
            memory.close()
        self.blocks.give_back()
        assert self.device.left() == (0, 0, 0)


class SinglyBackEnd(DeviceBackEnd):
    """A driver that unmaps one mapping at a time."""

    def driver(self) -> DeviceDriver:
        return FakeDriver(self.device, unmaps_runs=False)


class CudaBackEnd(DeviceBackEnd):
    def driver(self) -> DeviceDriver:
        api = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
        return CudaDriver(torch.device("cuda", 0), CudaStandIn(api, self.device))


class AscendBackEnd(DeviceBackEnd):
    def driver(self) -> DeviceDriver:
        return AscendDriver(torch.device("privateuseone", 0), AclStandIn(self.device))


BACK_ENDS = (CpuBackEnd, DeviceBackEnd, SinglyBackEnd, CudaBackEnd, AscendBackEnd)
"""All: for what is quick."""

KINDS = (CpuBackEnd, DeviceBackEnd)
"""One of each kind: for long histories."""


def read(address: int, count: int) -> bytes:
    """Read through a virtual address."""
    return ctypes.string_at(address, count)


def write(address: int, data: bytes) -> None:
    """Write through a virtual address."""
    ctypes.memmove(address, data, len(data))
