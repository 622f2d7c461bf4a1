"""The KV memory of a CPU: layout, views, copies, numbers that are not finite, real memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.errors import ConfigError, InvariantError
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory

LAYOUT = BlockLayout(12, 32, 3, 2, 8, 4)
NAN = float("nan")


def make(layout: BlockLayout = LAYOUT, dtype: torch.dtype = torch.float32) -> CpuKvMemory:
    return CpuKvMemory(layout, dtype)


def place(block: int, offset: int) -> int:
    return block * LAYOUT.block_size + offset


@pytest.mark.parametrize("size", [1, 8, 24, 48])
def test_block_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigError, match=f"power of two of at least 16 on a CPU, not {size}"):
        BlockLayout(4, size, 1, 1, 8, 4)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([16, 32, 256]),
    layers=st.integers(1, 5),
    heads=st.integers(1, 5),
    dim=st.integers(1, 130),
    item=st.sampled_from([1, 2, 4]),
)
def test_layout(size: int, layers: int, heads: int, dim: int, item: int) -> None:
    layout = BlockLayout(3, size, layers, heads, dim, item)
    used = 2 * layers * heads * dim * size * item
    assert layout.block_bytes % mmap.PAGESIZE == 0
    assert layout.block_bytes == used + layout.wasted_bytes
    assert 0 <= layout.wasted_bytes < mmap.PAGESIZE
    assert layout.layer_bytes == 2 * layout.key_bytes == layout.token_bytes * size
    assert layout.total_bytes == 3 * layout.block_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_numbers_lie_where_the_layout_says(dtype: torch.dtype) -> None:
    layout = BlockLayout(5, 32, 2, 3, 10, dtype.itemsize)
    memory = make(layout, dtype)
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randint(-90, 90, (2, 2, 3, 10), generator=generator).to(dtype).unbind()
    memory.write(1, torch.tensor([3 * 32 + 21, 32]), k, v)
    for row, (block, offset) in enumerate([(3, 21), (1, 0)]):
        for head in range(3):
            base = memory.pool_address + block * layout.block_bytes + layout.layer_bytes
            key_head = base + head * 32 * 10 * dtype.itemsize
            for d in range(10):
                at = key_head + ((offset // 16 * 10 + d) * 16 + offset % 16) * dtype.itemsize
                raw = bytearray(ctypes.string_at(at, dtype.itemsize))
                assert torch.frombuffer(raw, dtype=dtype)[0] == k[row, head, d]
            at = key_head + layout.key_bytes + offset * 10 * dtype.itemsize
            raw = bytearray(ctypes.string_at(at, 10 * dtype.itemsize))
            assert torch.equal(torch.frombuffer(raw, dtype=dtype), v[row, head])
    assert memory.keys(1).shape == (5, 3, 2, 10, 16)
    assert memory.values(1).shape == (5, 3, 32, 10)
    assert not memory.keys(0).any()
    assert not memory.values(0).any()
    assert memory.pool_tensor(torch.uint8).numel() == layout.total_bytes


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


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12))
def test_copies_are_made_in_order(pairs: list[tuple[int, int]]) -> None:
    memory = make()
    rows = memory.pool_tensor(torch.float32).view(12, -1)
    rows[:] = torch.arange(12.0)[:, None]
    want = list(range(12))
    memory.copy_blocks(pairs)
    for source, destination in pairs:
        want[destination] = want[source]
    assert rows[:, 0].tolist() == rows[:, -1].tolist() == want
    assert memory.statistics().num_copies == len(pairs)


def test_cleared_places_are_zero_and_others_stay() -> None:
    memory = make()
    memory.pool_tensor(torch.float32).fill_(1)
    memory.clear_slots([place(3, 5), place(3, 31), place(11, 0)])
    for layer in range(3):
        for block, offset in ((3, 5), (3, 31), (11, 0)):
            assert not memory.keys(layer)[block, :, offset // 16, :, offset % 16].any()
            assert not memory.values(layer)[block, :, offset].any()
        assert memory.values(layer).sum() == (12 * 32 - 3) * 2 * 8
        assert memory.keys(layer).sum() == (12 * 32 - 3) * 2 * 8


def test_what_is_not_finite_is_forgotten_and_the_rest_stays() -> None:
    memory = make()
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


def test_untouched_memory_is_not_real_and_looking_does_not_make_it_so() -> None:
    memory = make(BlockLayout(1000, 16, 4, 4, 64, 4))
    assert memory.layout.total_bytes > 100 << 20
    assert memory.resident_bytes() == 0
    row = torch.ones(1, 4, 64)
    memory.write(3, torch.tensor([500 * 16]), row, row)
    memory.may_hold_nan = True
    memory.forget()
    memory.check()
    assert 0 < memory.resident_bytes() < 1 << 20
    memory.give_back()
    assert memory.resident_bytes() == 0
    assert not memory.values(3)[500].any()


def test_it_takes_a_descriptor() -> None:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), LAYOUT.total_bytes)
        one = CpuKvMemory(LAYOUT, torch.float32, fd=file.fileno(), origin="arena")
        other = CpuKvMemory(LAYOUT, torch.float32, fd=file.fileno())
        one.values(0)[3] = 5
        assert other.values(0)[3].eq(5).all()
        os.ftruncate(file.fileno(), LAYOUT.total_bytes)
        large = BlockLayout(13, 32, 3, 2, 8, 4)
        with pytest.raises(InvariantError, match="its memory has"):
            CpuKvMemory(large, torch.float32, fd=file.fileno())


def test_its_descriptor_goes_with_it() -> None:
    memory = make()
    fd, kept = memory.fd, memory.values(0)
    kept[1] = 3
    del memory
    with pytest.raises(OSError):
        os.fstat(fd)
    assert kept[1].eq(3).all()  # the mapping lives as long as a tensor over it
