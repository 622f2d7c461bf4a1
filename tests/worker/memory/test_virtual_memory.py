"""One conformance suite for all back-ends of VirtualMemory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.memory.back_ends import (
    BACK_ENDS,
    PAGE,
    BackEnd,
    CpuBackEnd,
    DeviceBackEnd,
    read,
    write,
)
from xllm.errors import InvariantError
from xllm.worker.memory.virtual import VirtualMemory, available_mappings

NUM_PAGES = 32


class Setup:
    def __init__(self, back_end: BackEnd) -> None:
        self.back_end = back_end
        self.memory: VirtualMemory = back_end.open()
        assert self.memory.granularity == PAGE

    def physical(self, offset: int, count: int) -> bytes:
        return self.back_end.physical(offset // PAGE, offset % PAGE, count)


@pytest.fixture(params=BACK_ENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Setup]:
    setup = Setup(request.param(NUM_PAGES))
    yield setup
    setup.back_end.close()


def test_pages_are_seen_under_their_addresses(device: Setup) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(8 * unit)
    device.memory.map(base, 5 * unit, 2 * unit)
    device.memory.map(base + 2 * unit, 0, unit)
    write(base + unit, b"first")
    write(base + 2 * unit, b"second")
    assert device.physical(6 * unit, 5) == b"first"
    assert device.physical(0, 6) == b"second"


def test_a_write_across_pages_is_contiguous(device: Setup) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(2 * unit)
    device.memory.map(base, 9 * unit, unit)
    device.memory.map(base + unit, 3 * unit, unit)
    write(base + unit - 2, b"abcd")
    assert device.physical(10 * unit - 2, 2) == b"ab"
    assert device.physical(3 * unit, 2) == b"cd"


def test_one_page_under_two_ranges_is_one_page(device: Setup) -> None:
    unit = device.memory.granularity
    one, other = device.memory.reserve(2 * unit), device.memory.reserve(2 * unit)
    assert one != other
    device.memory.map(one, 4 * unit, unit)
    device.memory.map(other + unit, 4 * unit, unit)
    write(one + 7, b"shared")
    assert read(other + unit + 7, 6) == b"shared"


def test_mapping_again_replaces(device: Setup) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(3 * unit)
    device.memory.map(base, 0, 3 * unit)
    write(base + unit, b"old")
    device.memory.map(base + unit, 20 * unit, unit)
    write(base + unit, b"new")
    assert device.physical(unit, 3) == b"old"
    assert device.physical(20 * unit, 3) == b"new"


def test_unmapping_keeps_the_content_and_the_range(device: Setup) -> None:
    unit = device.memory.granularity
    base = device.memory.reserve(4 * unit)
    device.memory.map(base, 8 * unit, 4 * unit)
    write(base + unit, b"kept")
    device.memory.unmap(base + unit, 3 * unit)
    device.memory.unmap(base + unit, 3 * unit)  # nothing is there: nothing happens
    write(base, b"still")
    assert device.physical(9 * unit, 4) == b"kept"
    assert device.physical(8 * unit, 5) == b"still"
    device.memory.map(base + 2 * unit, 9 * unit, unit)
    assert read(base + 2 * unit, 4) == b"kept"


def test_what_is_not_reserved_or_not_there_is_refused(device: Setup) -> None:
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


def test_closing_twice(device: Setup) -> None:
    device.memory.reserve(device.memory.granularity)
    device.memory.close()
    device.memory.close()


def test_what_is_not_mapped_reads_as_zeros_or_faults(device: Setup) -> None:
    base = device.memory.reserve(1 << 40)
    device.memory.map(base, 0, PAGE)
    write(base, b"x" * PAGE)
    device.memory.unmap(base, PAGE)
    for address in (base, base + (1 << 39)):
        if device.back_end.reads_zeros:
            assert read(address, PAGE) == b"\0" * PAGE
        else:
            assert isinstance(device.back_end, DeviceBackEnd)
            assert not device.back_end.device.can_touch(address, 1)


def test_what_replaces_can_be_touched_and_what_it_replaced_is_elsewhere(device: Setup) -> None:
    memory = device.memory
    one, other = memory.reserve(4 * PAGE), memory.reserve(4 * PAGE)
    memory.map(one, 0, 4 * PAGE)
    memory.map(other, 0, 4 * PAGE)
    memory.map(one + PAGE, 8 * PAGE, 2 * PAGE)
    write(one, b"a" * 4 * PAGE)
    assert device.physical(0, 1) + device.physical(9 * PAGE, 1) == b"aa"
    write(other + PAGE, b"b" * PAGE)
    assert read(one + PAGE, 1) == b"a"
    assert device.physical(PAGE, 1) == b"b"


def test_cpu_kernel_merges_what_lies_together() -> None:
    back_end = CpuBackEnd(NUM_PAGES)
    memory = back_end.open()
    base = memory.reserve(16 * PAGE)

    def mappings() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        starts = [int(line.split("-")[0], 16) for line in lines]
        return sum(base <= start < base + 16 * PAGE for start in starts)

    for page in range(8):
        memory.map(base + page * PAGE, (4 + page) * PAGE, PAGE)
    assert mappings() <= 2
    memory.map(base + 8 * PAGE, 0, PAGE)
    assert mappings() <= 3
    back_end.close()


def test_available_mappings() -> None:
    allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert 0 <= available_mappings() < allowed
