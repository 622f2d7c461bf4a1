"""Virtual memory of a device: every call that may fail, threads, and what is left at the end."""

from __future__ import annotations

import threading

import pytest

from tests.worker.memory.back_ends import PAGE, read, write
from tests.worker.platform.host_device import FakeDriver, HostDevice
from xllm.errors import EngineError, InvariantError
from xllm.worker.memory.device_virtual import DeviceBlocks, DeviceVirtualMemory
from xllm.worker.memory.slots import NO_PAGE, SlotSpace

NUM_BLOCKS, BLOCK = 6, 2 * PAGE
CALLS = ("create", "release", "reserve", "free_range", "map", "unmap", "set_access")


class Setup:
    """What a history of calls goes over; whatever failed on the way, `close` leaves nothing."""

    def __init__(self, unmaps_runs: bool) -> None:
        self.device = HostDevice(total_bytes=NUM_BLOCKS * BLOCK)
        self.driver = FakeDriver(self.device, unmaps_runs=unmaps_runs)
        self.blocks: DeviceBlocks | None = None
        self.memories: list[DeviceVirtualMemory] = []

    def open(self) -> DeviceVirtualMemory:
        assert self.blocks is not None
        self.memories.append(DeviceVirtualMemory(self.blocks))
        return self.memories[-1]

    def history(self) -> None:
        """A bit of everything."""
        self.blocks = DeviceBlocks(self.driver, NUM_BLOCKS, BLOCK)
        pool, slots = self.open(), self.open()
        start = pool.reserve(NUM_BLOCKS * BLOCK)
        pool.map(start, 0, NUM_BLOCKS * BLOCK)
        base = slots.reserve(16 * BLOCK)
        slots.map(base, 2 * BLOCK, 3 * BLOCK)
        slots.map(base + BLOCK, 0, 4 * BLOCK)
        slots.unmap(base + 2 * BLOCK, 8 * BLOCK)
        slots.map(base + 3 * BLOCK, 0, BLOCK)
        slots.close()
        pool.unmap(start, NUM_BLOCKS * BLOCK)
        self.blocks.give_back()
        assert self.device.used_bytes == 0
        self.blocks.take()
        pool.close()
        self.blocks.give_back()

    def close(self) -> None:
        """No call fails any more."""
        self.device.fails_in, self.device.fails_on = 0, ""
        for memory in self.memories:
            memory.close()
        if self.blocks is not None:
            self.blocks.give_back()
        assert self.device.left() == (0, 0, 0)


@pytest.mark.parametrize("unmaps_runs", [True, False])
def test_whichever_call_fails_nothing_is_left(unmaps_runs: bool) -> None:
    whole = Setup(unmaps_runs)
    whole.history()
    assert whole.device.left() == (0, 0, 0)
    assert set(whole.device.calls) == set(CALLS)
    for number in range(1, len(whole.device.calls) + 1):
        setup = Setup(unmaps_runs)
        setup.device.fails_in = number
        with pytest.raises(EngineError, match="UNKNOWN"):
            setup.history()
        setup.close()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_always_fails_is_told_and_what_it_kept_goes_later(name: str) -> None:
    setup = Setup(unmaps_runs=True)
    setup.device.fails_on = name
    with pytest.raises(EngineError, match=f"^{name}: "):
        setup.history()
    setup.close()


def test_memory_that_does_not_suffice_is_not_taken_at_all() -> None:
    device = HostDevice(total_bytes=NUM_BLOCKS * BLOCK)
    with pytest.raises(EngineError, match="create: OUT_OF_MEMORY"):
        DeviceBlocks(FakeDriver(device), NUM_BLOCKS + 1, BLOCK)
    assert device.used_bytes == 0


@pytest.mark.parametrize("call", ["map", "set_access"])
def test_where_mapping_fails_nothing_can_be_touched_and_it_can_be_mapped_again(call: str) -> None:
    setup = Setup(unmaps_runs=True)
    setup.blocks = DeviceBlocks(setup.driver, NUM_BLOCKS, BLOCK)
    memory = setup.open()
    base = memory.reserve(8 * BLOCK)
    memory.map(base, 0, 4 * BLOCK)
    setup.device.fails_on = call
    with pytest.raises(EngineError):
        memory.map(base + BLOCK, 3 * BLOCK, 2 * BLOCK)
    assert [setup.device.can_touch(base + i * BLOCK, 1) for i in range(5)] == [1, 0, 0, 1, 0]
    setup.device.fails_on = ""
    memory.map(base + BLOCK, 3 * BLOCK, 2 * BLOCK)
    write(base + BLOCK, b"here")
    assert read(base + 3 * BLOCK, 4) == b"here"  # block 3 in both places
    setup.close()


def test_what_failed_and_could_not_be_taken_away_goes_before_the_next_map() -> None:
    setup = Setup(unmaps_runs=True)
    setup.blocks = DeviceBlocks(setup.driver, NUM_BLOCKS, BLOCK)
    memory = setup.open()
    base = memory.reserve(2 * BLOCK)
    device = setup.device

    def fail_behind(*args: int) -> None:
        device.fails_on = "unmap"
        raise EngineError("set_access: UNKNOWN")

    setup.driver.set_access, real = fail_behind, setup.driver.set_access
    with pytest.raises(EngineError, match="set_access"):
        memory.map(base, 0, 2 * BLOCK)
    assert device.left() == (1, NUM_BLOCKS, 2)
    assert not device.can_touch(base, 1)
    setup.driver.set_access = real
    device.fails_on = ""
    memory.map(base, 4 * BLOCK, 2 * BLOCK)
    assert device.can_touch(base, 2 * BLOCK)
    setup.close()


def test_a_slot_counts_on_no_page_that_may_be_gone() -> None:
    setup = Setup(unmaps_runs=False)
    setup.blocks = DeviceBlocks(setup.driver, NUM_BLOCKS, BLOCK)
    space = SlotSpace(
        setup.open(), num_slots=2, pages_per_slot=4, page_bytes=BLOCK, num_pages=NUM_BLOCKS
    )
    space.map(1, 0, (0, 3, 1, 2))
    setup.device.fails_in = 2
    with pytest.raises(EngineError):
        space.unmap(1, 1)
    assert list(space.pages(1)) == [0, NO_PAGE, NO_PAGE, NO_PAGE]
    space.check()
    space.map(1, 1, (4, 1, 2))
    assert list(space.pages(1)) == [0, 4, 1, 2]
    assert setup.device.can_touch(space.address(1), 4 * BLOCK)
    space.unmap(1)
    assert list(space.pages(1)) == []
    setup.close()


def test_places_that_are_no_blocks_are_refused() -> None:
    setup = Setup(unmaps_runs=True)
    setup.blocks = DeviceBlocks(setup.driver, NUM_BLOCKS, BLOCK)
    memory = setup.open()
    base = memory.reserve(4 * BLOCK)
    for address, offset, count in (
        (base + PAGE, 0, BLOCK),
        (base, PAGE, BLOCK),
        (base, 0, PAGE),
        (base, 0, 5 * BLOCK),
    ):
        with pytest.raises(InvariantError):
            memory.map(address, offset, count)
    setup.blocks.give_back()
    with pytest.raises(InvariantError, match="block 0 of 6, 0 bytes"):
        memory.map(base, 0, BLOCK)
    setup.close()


def test_slots_are_mapped_by_several_threads_at_once() -> None:
    setup = Setup(unmaps_runs=True)
    setup.blocks = DeviceBlocks(setup.driver, NUM_BLOCKS, BLOCK)
    memory = setup.open()
    base = memory.reserve(4 * 8 * BLOCK)
    failed: list[BaseException] = []

    def work(slot: int) -> None:
        try:
            start = base + slot * 8 * BLOCK
            for turn in range(60):
                first = (slot + turn) % 4
                memory.map(start + turn % 5 * BLOCK, first * BLOCK, 2 * BLOCK)
                memory.unmap(start + turn % 3 * BLOCK, 4 * BLOCK)
            memory.unmap(start, 8 * BLOCK)
            memory.map(start, slot * BLOCK, BLOCK)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert setup.device.left() == (1, NUM_BLOCKS, 4)
    setup.close()
