"""The kernels over a device's virtual memory: what rope_write writes, attention reads, in slots
whose first blocks are the same memory, and by the pool's block addresses.

What is not mapped cannot be touched here: a read behind a sequence's blocks ends the process.
"""

import mmap

import pytest
import torch

from tests.worker.platform.host_device import FakeDriver, HostDevice
from tests.worker.triton_interpreter import DEVICE
from tests.worker.triton_kernels.attention_case import attention_of
from xllm.worker.layers.rotary import Rotary
from xllm.worker.loader.config import RopeConfig
from xllm.worker.memory.device_layout import DeviceLayout
from xllm.worker.memory.device_memory import DeviceKvMemory
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.triton_kernels.decode_attention import decode_attention
from xllm.worker.triton_kernels.prefill_attention import prefill_attention
from xllm.worker.triton_kernels.rope_write import rope_write
from xllm.worker.triton_kernels.strides import strides_of
from xllm.worker.triton_kernels.tiling import row_tiles, tile_tokens

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the fake device is the host")

LAYOUT = DeviceLayout(8, 16, 2, 2, 16, 4, mmap.PAGESIZE)
STRIDES = strides_of(LAYOUT, torch.float32)
HEADS, DIM, KV = 6, LAYOUT.head_dim, LAYOUT.num_kv_heads
PAGES = [(5, 2, 7), (5, 2, 1)]
"""Blocks of two sequences: the first 32 tokens are the same memory."""
SHARED = 32


class Bench:
    """Two slots, and the rows of both sequences' tokens with what torch makes of them."""

    def __init__(self):
        self.memory = DeviceKvMemory(
            LAYOUT, torch.float32, FakeDriver(HostDevice(total_bytes=LAYOUT.total_bytes))
        )
        self.slots = SlotSpace(
            self.memory.slot_memory(),
            num_slots=2,
            pages_per_slot=4,
            page_bytes=LAYOUT.block_bytes,
            num_pages=LAYOUT.num_blocks,
        )
        for slot, pages in enumerate(PAGES):
            self.slots.map(slot, 0, pages)
        generator = torch.Generator().manual_seed(3)
        rows = torch.randn(2, 3 * LAYOUT.block_size, HEADS + 2 * KV, DIM, generator=generator)
        rows[1, :SHARED] = rows[0, :SHARED]
        self.rows = rows
        self.rotary = Rotary(RopeConfig(), DIM, DEVICE)
        tables = self.rotary.tables(torch.arange(rows.shape[1]), torch.float32)
        self.q, k, self.v = zip(*(x.split([HEADS, KV, KV], dim=1) for x in rows), strict=True)
        self.q, self.k = ([tables.rotate(x) for x in parts] for parts in (self.q, k))

    def close(self):
        self.slots.close()
        self.memory.close()

    def write(self, layer, spans):
        """Writes the tokens of spans (slot, first, last); gives their queries, packed."""
        packed = torch.cat([self.rows[slot, first:last] for slot, first, last in spans])
        positions = torch.cat([torch.arange(first, last) for _, first, last in spans])
        q = torch.empty(len(packed), HEADS, DIM)
        addresses = [self.slots.address(slot) for slot, a, b in spans for _ in range(a, b)]
        rope_write(
            packed.flatten(1).contiguous(), q, *self.rotary.angles(positions),
            torch.tensor(addresses), positions.int(), layer, STRIDES,
        )  # fmt: skip
        return q

    def addresses(self, slots, tables):
        if not tables:
            return torch.tensor([self.slots.address(slot) for slot in slots])
        pool = self.memory.pool_address
        return torch.tensor(
            [[pool + page * LAYOUT.block_bytes for page in PAGES[slot]] for slot in slots]
        )

    def prefill(self, layer, spans, q, tables=False):
        counts = [last - first for _, first, last in spans]
        ends = [last for _, _, last in spans]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        out = torch.empty_like(q)
        prefill_attention(
            q, out, torch.tensor(starts, dtype=torch.int32),
            torch.tensor(row_tiles(counts, ends, tile_tokens(STRIDES, HEADS)), dtype=torch.int32),
            self.addresses([slot for slot, _, _ in spans], tables),
            torch.tensor(ends, dtype=torch.int32), layer, STRIDES, scale=0.25,
        )  # fmt: skip
        return out

    def decode(self, layer, ends, q, tables=False):
        out = torch.empty(len(ends), 1, HEADS, DIM)
        decode_attention(
            q[:, None], out, self.addresses(range(len(ends)), tables),
            torch.tensor(ends, dtype=torch.int32), layer, STRIDES, scale=0.25, max_length=64,
            scratch=torch.empty(1 << 12),
        )  # fmt: skip
        return out

    def expected(self, slot, first, last):
        keys, values = (x[slot][:last].transpose(0, 1) for x in (self.k, self.v))
        rows = torch.arange(first, last)
        return attention_of(self.q[slot][first:last], keys, values, rows, 0.25)


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_prefix_that_two_slots_share_is_read_in_both(bench, layer):
    """The second sequence computes only what is its own, then both decode in one step."""
    first = [(0, 0, 40)]
    found = bench.prefill(layer, first, bench.write(layer, first))
    torch.testing.assert_close(found, bench.expected(0, 0, 40), atol=2e-5, rtol=2e-5)

    both = [(1, SHARED, 45), (0, 40, 42)]
    q = bench.write(layer, both)
    torch.testing.assert_close(q[:13], bench.q[1][SHARED:45], atol=1e-5, rtol=1e-5)
    found = bench.prefill(layer, both, q)
    wanted = torch.cat([bench.expected(*span) for span in both])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(bench.prefill(layer, both, q, tables=True), found)

    steps = [(0, 42, 43), (1, 45, 46)]
    q = bench.write(layer, steps)
    found = bench.decode(layer, [43, 46], q)
    wanted = torch.cat([bench.expected(*span) for span in steps])
    torch.testing.assert_close(found[:, 0], wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(bench.decode(layer, [43, 46], q, tables=True), found)
    other = bench.memory.keys(1 - layer)
    assert not other.any()


def test_a_slots_last_block_may_be_full(bench):
    """Nothing behind it is mapped."""
    whole = [(0, 0, 48)]
    found = bench.prefill(0, whole, bench.write(0, whole))
    torch.testing.assert_close(found, bench.expected(0, 0, 48), atol=2e-5, rtol=2e-5)
    q = bench.q[0][47:48].contiguous()
    found = bench.decode(0, [48], q)
    torch.testing.assert_close(found[0], bench.expected(0, 47, 48), atol=2e-5, rtol=2e-5)
