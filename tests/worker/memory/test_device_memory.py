"""The KV memory of a device over a fake driver: layout, views, copies, numbers that are not finite,
memory given back and taken again, and calls that fail."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.platform.host_device import FakeDriver, HostDevice
from xllm.errors import EngineError, InvariantError
from xllm.worker.memory.device_layout import DeviceLayout
from xllm.worker.memory.device_memory import DeviceKvMemory
from xllm.worker.memory.slots import SlotSpace

LAYOUT = DeviceLayout(12, 32, 3, 2, 8, 4, 4096)
NAN = float("nan")


def make(layout: DeviceLayout = LAYOUT, dtype: torch.dtype = torch.float32) -> DeviceKvMemory:
    return DeviceKvMemory(layout, dtype, FakeDriver(HostDevice(total_bytes=layout.total_bytes)))


def place(block: int, offset: int) -> int:
    return block * LAYOUT.block_size + offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_lie_where_the_layout_says_in_the_pool_and_in_slots(dtype: torch.dtype) -> None:
    layout = DeviceLayout(5, 32, 2, 3, 10, dtype.itemsize, 4096)
    memory = make(layout, dtype)
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randint(-90, 90, (2, 2, 3, 10), generator=generator).to(dtype).unbind()
    memory.write(1, torch.tensor([3 * 32 + 21, 32]), k, v)
    slots = SlotSpace(
        memory.slot_memory(),
        num_slots=2,
        pages_per_slot=4,
        page_bytes=layout.block_bytes,
        num_pages=5,
    )
    slots.map(1, 0, (4, 3, 1))
    for row, (block, offset, token) in enumerate([(3, 21, 32 + 21), (1, 0, 64)]):
        for head in range(3):
            for is_value, want in ((False, k), (True, v)):
                inside = layout.offset(offset, 1, head, is_value=is_value)
                for at in (
                    memory.pool_address + block * layout.block_bytes + inside,
                    slots.address(1) + layout.offset(token, 1, head, is_value=is_value),
                ):
                    raw = bytearray(ctypes.string_at(at, 10 * dtype.itemsize))
                    assert torch.equal(torch.frombuffer(raw, dtype=dtype), want[row, head])
    assert memory.keys(1).shape == memory.values(1).shape == (5, 3, 32, 10)
    assert not memory.keys(0).any()  # a device's memory comes with anything in it
    assert not memory.values(0).any()
    slots.close()
    memory.close()


def test_gather_gives_tokens_back_in_order() -> None:
    memory = make()
    torch.manual_seed(2)
    k, v = torch.randn(2, 64, 2, 8).unbind()
    places = torch.tensor([place(7, i) for i in range(32)] + [place(2, i) for i in range(32)])
    memory.write(2, places, k, v)
    keys, values = torch.empty(2, 3, 32 * 2 * 8).unbind()
    memory.gather(2, torch.tensor([2, 7, 2]), keys, values)
    for got, want in ((keys, k), (values, v)):
        assert torch.equal(got.view(3, 32, 2, 8)[0], want[32:])
        assert torch.equal(got.view(3, 32, 2, 8)[1], want[:32])
        assert torch.equal(got[0], got[2])
    memory.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12))
def test_copies_are_made_in_order(pairs: list[tuple[int, int]]) -> None:
    memory = make()
    for block in range(12):
        memory.keys(0)[block] = memory.values(2)[block] = block
    want = list(range(12))
    memory.copy_blocks(pairs)
    for source, destination in pairs:
        want[destination] = want[source]
    assert memory.keys(0)[:, 0, 0, 0].tolist() == memory.values(2)[:, 1, 31, 7].tolist() == want
    assert memory.statistics().num_copies == len(pairs)
    memory.close()


def test_cleared_places_are_zero_and_others_stay() -> None:
    memory = make()
    for layer in range(3):
        memory.keys(layer).fill_(1)
        memory.values(layer).fill_(1)
    memory.clear_slots([place(3, 5), place(3, 31), place(11, 0)])
    for layer in range(3):
        for part in (memory.keys(layer), memory.values(layer)):
            for block, offset in ((3, 5), (3, 31), (11, 0)):
                assert not part[block, :, offset].any()
            assert part.sum() == (12 * 32 - 3) * 2 * 8
    memory.close()


def test_what_is_not_finite_is_forgotten_and_the_rest_stays() -> None:
    memory = make()
    memory.check()
    row = torch.full((1, 2, 8), NAN)
    memory.write(1, torch.tensor([place(4, 1)]), row, row)
    memory.write(0, torch.tensor([place(9, 1)]), torch.ones_like(row), torch.ones_like(row))
    with pytest.raises(InvariantError, match="NaN or infinity unnoticed, from block 4"):
        memory.check()
    memory.may_hold_nan = True
    memory.check()
    memory.forget()
    memory.check()
    assert not memory.may_hold_nan
    assert memory.keys(1).abs().sum() == 0
    assert memory.values(0)[9, :, 1].eq(1).all()
    memory.close()


def test_memory_goes_back_and_comes_again_at_the_same_addresses() -> None:
    device = HostDevice(total_bytes=LAYOUT.total_bytes)
    memory = DeviceKvMemory(LAYOUT, torch.float32, FakeDriver(device))
    address = memory.pool_address
    memory.values(1).fill_(NAN)
    memory.may_hold_nan = True
    for _ in range(2):
        memory.give_back()
        assert (device.used_bytes, memory.held_bytes) == (0, 0)
        assert not device.can_touch(address, 1)
        memory.give_back()  # again: nothing happens
        memory.forget()
        memory.check()
        memory.take_back()
        memory.take_back()
        assert device.used_bytes == memory.held_bytes == LAYOUT.total_bytes
        assert memory.pool_address == address
        assert not memory.may_hold_nan
        assert not memory.values(1).any()
        memory.check()
        memory.keys(0)[11].fill_(3)
        assert ctypes.string_at(address + 11 * LAYOUT.block_bytes, 4) == b"\0\0\x40\x40"
    memory.close()
    memory.close()
    assert device.left() == (0, 0, 0)


def test_what_others_took_meanwhile_is_told_and_waking_can_be_tried_again() -> None:
    device = HostDevice(total_bytes=LAYOUT.total_bytes)
    driver = FakeDriver(device)
    memory = DeviceKvMemory(LAYOUT, torch.float32, driver)
    memory.give_back()
    other = driver.create(LAYOUT.block_bytes)
    with pytest.raises(EngineError, match="create: OUT_OF_MEMORY"):
        memory.take_back()
    assert device.used_bytes == LAYOUT.block_bytes
    driver.release(other)
    memory.take_back()
    memory.check()
    memory.close()
    assert device.left() == (0, 0, 0)


@pytest.mark.parametrize("unmaps_runs", [True, False])
def test_whichever_call_fails_nothing_is_left(unmaps_runs: bool) -> None:
    def history(device: HostDevice, made: list[DeviceKvMemory]) -> None:
        driver = FakeDriver(device, unmaps_runs=unmaps_runs)
        made.append(DeviceKvMemory(LAYOUT, torch.float32, driver))
        made[0].give_back()
        made[0].take_back()
        made[0].close()

    device = HostDevice()
    history(device, [])
    for number in range(1, len(device.calls) + 1):
        device, made = HostDevice(), []
        device.fails_in = number
        with pytest.raises(EngineError, match="UNKNOWN"):
            history(device, made)
        for memory in made:
            memory.close()
        assert device.left() == (0, 0, 0)


def test_a_memory_that_failed_half_can_be_taken_again() -> None:
    device = HostDevice()
    memory = DeviceKvMemory(LAYOUT, torch.float32, FakeDriver(device))
    for call in ("unmap", "release", "create", "map", "set_access"):
        device.fails_on = call
        with pytest.raises(EngineError, match=call):
            memory.give_back()
            memory.take_back()
        device.fails_on = ""
        memory.take_back()
        memory.keys(2).fill_(1)
        memory.check()
        assert device.used_bytes == LAYOUT.total_bytes
    memory.close()
    assert device.left() == (0, 0, 0)


def test_it_goes_with_its_last_user() -> None:
    device = HostDevice()
    memory = DeviceKvMemory(LAYOUT, torch.float32, FakeDriver(device))
    assert device.left() == (1, 12, 12)
    del memory
    assert device.left() == (0, 0, 0)
