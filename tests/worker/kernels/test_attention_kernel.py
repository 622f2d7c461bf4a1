"""The attention kernel against attention written out, and the independence of its bits."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.worker.attention.plan import Span
from xllm.worker.kernels.attention import KernelAttention
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.team import Team
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.rounded import SCALE_BYTES, round_heads
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.memory.virtual import CpuVirtualMemory

LIBRARY = load().compiled
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built")
VARIANTS = [v.number for v in LIBRARY.variants if v.usable and v.number] if LIBRARY else []
LAYER = 1


@pytest.fixture(scope="module")
def teams() -> list[Team]:
    assert LIBRARY is not None
    return [Team(LIBRARY, 1), Team(LIBRARY, 3)]


def no_tick() -> None:
    """Nobody watches."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's attention and its memory."""

    kv_heads: int
    group: int
    dim: int
    block_size: int
    dtype: torch.dtype
    window: int
    softcap: float


def as_kept(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers [rows, heads, dim] as the memory keeps them, in float64."""
    if dtype != torch.int8:
        return x.to(dtype).double()
    numbers, scales = round_heads(x)
    return numbers.double() * scales[..., None].double()


class Histories:
    """Random queries, keys and values of sequences, by position."""

    def __init__(self, shape: Shape, lengths: list[int], seed: int) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        heads, dim = shape.kv_heads * shape.group, shape.dim

        def normal(length: int, count: int) -> torch.Tensor:
            return torch.randn(length, count, dim, generator=generator)

        self.q = [normal(length, heads) for length in lengths]
        self.k = [normal(length, shape.kv_heads) for length in lengths]
        self.v = [normal(length, shape.kv_heads) for length in lengths]

    def expected(self, index: int) -> torch.Tensor:
        """[length, heads * dim] of a sequence, in float64."""
        shape = self.shape
        q = self.q[index].double()
        k, v = (
            as_kept(x[index], shape.dtype).repeat_interleave(shape.group, 1)
            for x in (self.k, self.v)
        )
        scores = torch.einsum("nhd,thd->hnt", q, k) * shape.dim**-0.5
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        position = torch.arange(len(q))
        hidden = position > position[:, None]
        if shape.window:
            hidden |= position <= position[:, None] - shape.window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hnt,thd->nhd", weights, v).flatten(1)

    def run(
        self,
        steps: list[list[tuple[int, int]]],
        team: Team,
        variant: int,
        seed: int,
        in_slots: Sequence[bool] = (),
    ) -> list[torch.Tensor]:
        """Attend in steps of (sequence, rows), block tables shuffled by `seed`, over memory whose
        unwritten numbers are NaN: [length, heads * dim] of each sequence, as far as it came.
        `in_slots`: which of them have slots; their tables then name no block of any."""
        shape = self.shape
        size = shape.block_size
        counts = [-(-len(q) // size) for q in self.q]
        rounded = shape.dtype == torch.int8
        layout = BlockLayout(
            *(sum(counts) + 1, size, 2, shape.kv_heads, shape.dim, shape.dtype.itemsize),
            scale_bytes=SCALE_BYTES if rounded else 0,
        )
        memory = CpuKvMemory(layout, shape.dtype)
        memory.pool_tensor(torch.float32 if rounded else shape.dtype).fill_(float("nan"))
        order = torch.randperm(layout.num_blocks, generator=torch.Generator().manual_seed(seed))
        free = order.tolist()
        tables = [array("q", [free.pop() for _ in range(count)]) for count in counts]
        addresses = [0] * len(tables)
        slots = SlotSpace(
            CpuVirtualMemory(memory.fd),
            num_slots=len(tables),
            pages_per_slot=max(counts),
            page_bytes=layout.block_bytes,
            num_pages=layout.num_blocks,
        )
        for index, has_slot in enumerate(in_slots):
            if has_slot:
                slots.map(index, 0, tables[index])
                addresses[index] = slots.address(index)
                tables[index] = array("q", [-1 - index] * counts[index])
        done = [0] * len(self.q)
        found: list[list[torch.Tensor]] = [[] for _ in self.q]
        for step in steps:
            spans = [
                Span(done[index], rows, tables[index], addresses[index]) for index, rows in step
            ]
            attention = KernelAttention(team, memory, spans, (0, shape.window), no_tick, variant)
            parts = [
                torch.cat([x[i][done[i] : done[i] + n] for i, n in step])
                for x in (self.q, self.k, self.v)
            ]
            out = attention.attend(LAYER, *parts, softcap=shape.softcap)
            for (index, rows), part in zip(step, out.split([n for _, n in step]), strict=True):
                found[index].append(part)
                done[index] += rows
        return [torch.cat(parts) if parts else torch.empty(0) for parts in found]


shapes = st.builds(
    Shape,
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 7, 16, 20]),
    dim=st.sampled_from([8, 16, 24, 40, 64, 80, 128, 256]),
    block_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    window=st.sampled_from([0, 0, 1, 16, 24, 300]),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
)
lengths = st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 530]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes, st.lists(lengths, min_size=1, max_size=4), st.data())
def test_every_variant_attends(
    teams: list[Team], shape: Shape, sizes: list[int], data: st.DataObject
) -> None:
    histories = Histories(shape, sizes, seed=len(sizes))
    heads = [data.draw(st.integers(1, size)) for size in sizes]
    first = [(i, n) for i, n in enumerate(heads)]
    rest = [(i, size - n) for i, (size, n) in enumerate(zip(sizes, heads, strict=True)) if size > n]
    variant = data.draw(st.sampled_from(VARIANTS))
    for team in teams:
        got = histories.run([first, rest] if rest else [first], team, variant, 1)
        for index, rows in enumerate(got):
            assert (rows.double() - histories.expected(index)).abs().max() < 3e-5


@settings(max_examples=12, deadline=None, derandomize=True)
@given(shapes, lengths, st.lists(lengths, max_size=3), st.data())
def test_bits_depend_on_the_own_context_alone(
    teams: list[Team], shape: Shape, size: int, others: list[int], data: st.DataObject
) -> None:
    """One sequence alone in one go, against it cut anyhow among others, elsewhere in memory."""
    histories = Histories(shape, [size, *others], seed=size)
    variant = data.draw(st.sampled_from(VARIANTS))
    alone = histories.run([[(0, size)]], teams[0], variant, 1)[0]
    steps: list[list[tuple[int, int]]] = []
    left = dict(enumerate([size, *others]))
    while left:
        step = []
        for index in data.draw(st.permutations(sorted(left))):
            # One token at a time only where that is soon over.
            rows = data.draw(st.integers(1 if left[index] < 20 else left[index] // 2, left[index]))
            step.append((index, rows))
            left[index] -= rows
        left = {index: rows for index, rows in left.items() if rows}
        steps.append(step)
    team = data.draw(st.sampled_from(teams))
    assert torch.equal(histories.run(steps, team, variant, 2)[0], alone)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(shapes, st.lists(lengths, min_size=1, max_size=4), st.data())
def test_a_slot_is_read_as_its_block_table_would_be(
    teams: list[Team], shape: Shape, sizes: list[int], data: st.DataObject
) -> None:
    """Sequences in slots beside others by their tables: the same bits as all by their tables."""
    histories = Histories(shape, sizes, seed=len(sizes))
    heads = [data.draw(st.integers(1, size)) for size in sizes]
    steps = [list(enumerate(heads))]
    if rest := [(i, size - heads[i]) for i, size in enumerate(sizes) if size > heads[i]]:
        steps.append(rest)
    variant = data.draw(st.sampled_from(VARIANTS))
    team = data.draw(st.sampled_from(teams))
    in_slots = [True, *(data.draw(st.booleans()) for _ in sizes[1:])]
    by_table = histories.run(steps, team, variant, 1)
    by_slot = histories.run(steps, team, variant, 2, in_slots)
    for want, got in zip(by_table, by_slot, strict=True):
        assert torch.equal(want, got)
