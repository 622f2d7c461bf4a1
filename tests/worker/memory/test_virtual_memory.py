"""One conformance suite for all back-ends of VirtualMemory; a back-end is a `Device` here."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from xllm.errors import InvariantError
from xllm.worker.memory.virtual import CpuVirtualMemory, VirtualMemory, available_mappings

NUM_PAGES = 32


class Device(Protocol):
    """A back-end with a physical memory of NUM_PAGES pages of its granularity."""

    memory: VirtualMemory

    def write(self, address: int, data: bytes) -> None:
        """Write through a virtual address."""

    def read(self, address: int, count: int) -> bytes:
        """Read through a virtual address."""

    def physical(self, offset: int, count: int) -> bytes:
        """Read the physical memory."""

    def close(self) -> None:
        """Give all up."""


class CpuDevice:
    def __init__(self) -> None:
        self._fd = os.memfd_create("pages", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, NUM_PAGES * mmap.PAGESIZE)
        self.memory: VirtualMemory = CpuVirtualMemory(self._fd)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def read(self, address: int, count: int) -> bytes:
        return ctypes.string_at(address, count)

    def physical(self, offset: int, count: int) -> bytes:
        return os.pread(self._fd, count, offset)

    def close(self) -> None:
        self.memory.close()
        os.close(self._fd)


@pytest.fixture(params=[CpuDevice])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    device = request.param()
    yield device
    device.close()


def test_pages_are_seen_under_their_addresses(device: Device) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(8 * unit)
    device.memory.map(base, 5 * unit, 2 * unit)
    device.memory.map(base + 2 * unit, 0, unit)
    device.write(base + unit, b"first")
    device.write(base + 2 * unit, b"second")
    assert device.physical(6 * unit, 5) == b"first"
    assert device.physical(0, 6) == b"second"


def test_a_write_across_pages_is_contiguous(device: Device) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(2 * unit)
    device.memory.map(base, 9 * unit, unit)
    device.memory.map(base + unit, 3 * unit, unit)
    device.write(base + unit - 2, b"abcd")
    assert device.physical(10 * unit - 2, 2) == b"ab"
    assert device.physical(3 * unit, 2) == b"cd"


def test_one_page_under_two_ranges_is_one_page(device: Device) -> None:
    unit = device.memory.granularity
    one, other = device.memory.reserve(2 * unit), device.memory.reserve(2 * unit)
    assert one != other
    device.memory.map(one, 4 * unit, unit)
    device.memory.map(other + unit, 4 * unit, unit)
    device.write(one + 7, b"shared")
    assert device.read(other + unit + 7, 6) == b"shared"


def test_mapping_again_replaces(device: Device) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(3 * unit)
    device.memory.map(base, 0, 3 * unit)
    device.write(base + unit, b"old")
    device.memory.map(base + unit, 20 * unit, unit)
    device.write(base + unit, b"new")
    assert device.physical(unit, 3) == b"old"
    assert device.physical(20 * unit, 3) == b"new"


def test_unmapping_keeps_the_content_and_the_range(device: Device) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(4 * unit)
    device.memory.map(base, 8 * unit, 4 * unit)
    device.write(base + unit, b"kept")
    device.memory.unmap(base + unit, 3 * unit)
    device.memory.unmap(base + unit, 3 * unit)  # nothing is there: nothing happens
    device.write(base, b"still")
    assert device.physical(9 * unit, 4) == b"kept"
    assert device.physical(8 * unit, 5) == b"still"
    device.memory.map(base + 2 * unit, 9 * unit, unit)
    assert device.read(base + 2 * unit, 4) == b"kept"


def test_what_is_not_reserved_or_not_there_is_refused(device: Device) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(2 * unit)
    for address, offset, count in (
        (base + unit, 0, 2 * unit),
        (base - unit, 0, unit),
        (base, (NUM_PAGES - 1) * unit, 2 * unit),
        (base, -unit, unit),
        (base, 0, 0),
    ):
        with pytest.raises(InvariantError):
            device.memory.map(address, offset, count)
    with pytest.raises(InvariantError, match="no range"):
        device.memory.unmap(base + unit, 2 * unit)


def test_closing_twice(device: Device) -> None:
    device.memory.reserve(device.memory.granularity)
    device.memory.close()
    device.memory.close()


def test_cpu_tails_read_as_zeros() -> None:
    device = CpuDevice()
    unit = device.memory.granularity
    base = device.memory.reserve(1 << 40)
    assert device.read(base + (1 << 39), 4) == b"\0" * 4
    device.memory.map(base, 0, unit)
    device.write(base, b"x" * unit)
    device.memory.unmap(base, unit)
    assert device.read(base, unit) == b"\0" * unit
    device.close()


def test_cpu_kernel_merges_what_lies_together() -> None:
    device = CpuDevice()
    unit = device.memory.granularity
    base = device.memory.reserve(16 * unit)

    def mappings() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        starts = [int(line.split("-")[0], 16) for line in lines]
        return sum(base <= start < base + 16 * unit for start in starts)

    for page in range(8):
        device.memory.map(base + page * unit, (4 + page) * unit, unit)
    assert mappings() <= 2
    device.memory.map(base + 8 * unit, 0, unit)
    assert mappings() <= 3
    device.close()


def test_available_mappings() -> None:
    allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert 0 <= available_mappings() < allowed
