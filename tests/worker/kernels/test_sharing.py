"""Memory that sequences share is found, read once, and changes no bit."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.worker.attention.plan import Span
from xllm.worker.attention.sharing import PARTITION, find_sharing
from xllm.worker.kernels.attention import KernelAttention
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.team import Team
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.rounded import SCALE_BYTES
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.memory.virtual import CpuVirtualMemory

LIBRARY = load().compiled
VARIANTS = [v.number for v in LIBRARY.variants if v.usable and v.number] if LIBRARY else []
compiled = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built")


@dataclasses.dataclass(frozen=True)
class Branch:
    """A sequence that begins as an earlier one, `parent`, for `shared` tokens, has `own` tokens
    more and computes the last `rows` of them."""

    parent: int
    shared: int
    own: int
    rows: int


def make_spans(branches: Sequence[Branch], size: int) -> tuple[list[Span], int]:
    """Spans over blocks of `size` tokens, and how many blocks there are."""
    spans: list[Span] = []
    num_blocks = 0
    for branch in branches:
        table = array("q")
        if spans and branch.parent >= 0:
            parent = spans[branch.parent % len(spans)]
            table = parent.block_ids[: min(branch.shared, parent.start) // size]
        length = len(table) * size + branch.own
        wanted = -(-length // size) - len(table)
        table.extend(range(num_blocks, num_blocks + wanted))
        num_blocks += wanted
        rows = min(branch.rows, branch.own)
        spans.append(Span(length - rows, rows, table))
    return spans, num_blocks


trees = st.lists(
    st.builds(
        Branch,
        parent=st.integers(-1, 5),
        shared=st.sampled_from([0, 16, 250, 256, 272, 512, 530, 800]),
        own=st.sampled_from([1, 2, 40, 256, 300, 560]),
        rows=st.sampled_from([1, 1, 1, 2, 3, 8, 20]),
    ),
    min_size=1,
    max_size=7,
)
sizes = st.sampled_from([16, 64, 256, 512])


def in_common(one: Span, other: Span, size: int) -> int:
    """Whole partitions that two spans have in common, block by block."""
    equal = 0
    while equal < min(len(one.block_ids), len(other.block_ids)):
        if one.block_ids[equal] != other.block_ids[equal]:
            break
        equal += 1
    return min(equal * size, one.start, other.start) // PARTITION


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees, sizes)
def test_neighbours_have_most_in_common(branches: list[Branch], size: int) -> None:
    spans, _ = make_spans(branches, size)
    if size > PARTITION:  # partitions are shared by whole blocks
        spans = [Span(span.start // size * size, 1, span.block_ids) for span in spans]
    order, common = find_sharing(spans, size)
    assert len(set(order)) == len(order) == len(common)
    small = [i for i, span in enumerate(spans) if span.num_rows <= 8]
    for one in small:
        most = max((in_common(spans[one], spans[i], size) for i in small if i != one), default=0)
        assert (one in order) == (most > 0)
    for first in range(len(order)):
        for second in range(first + 1, len(order)):
            wanted = in_common(spans[order[first]], spans[order[second]], size)
            assert min(common[first + 1 : second + 1]) == wanted
    assert not common or common[0] == 0


class SharedMemory:
    """Memory of spans, their histories written, the last rows too: what `attend` gives, of all
    spans in a step or of some."""

    def __init__(
        self, branches: list[Branch], dtype: torch.dtype, size: int, group: int, dim: int
    ) -> None:
        self.spans, num_blocks = make_spans(branches, size)
        rounded = dtype == torch.int8
        self.layout = BlockLayout(
            *(num_blocks, size, 2, 2, dim, dtype.itemsize),
            scale_bytes=SCALE_BYTES if rounded else 0,
        )
        self.memory = CpuKvMemory(self.layout, dtype)
        self.memory.pool_tensor(torch.float32 if rounded else dtype).fill_(float("nan"))
        self._generator = torch.Generator().manual_seed(num_blocks)
        self._heads, self._dim = 2 * group, dim
        self.rows: list[list[torch.Tensor]] = []
        assert LIBRARY is not None
        team = Team(LIBRARY, 1)
        for span in self.spans:
            inputs = self._draw(span.end)
            whole = Span(0, span.end, span.block_ids)
            attention = KernelAttention(team, self.memory, [whole], (0, 0), lambda: None)
            attention.attend(1, *inputs)
            self.rows.append([part[span.start :] for part in inputs])

    def _draw(self, length: int) -> list[torch.Tensor]:
        counts = (self._heads, 2, 2)
        return [torch.randn(length, n, self._dim, generator=self._generator) for n in counts]

    def into_slots(self, wanted: Sequence[bool]) -> SlotSpace:
        """Reach those spans by slots."""
        slots = SlotSpace(
            CpuVirtualMemory(self.memory.fd),
            num_slots=len(self.spans),
            pages_per_slot=max(len(span.block_ids) for span in self.spans),
            page_bytes=self.layout.block_bytes,
            num_pages=self.layout.num_blocks,
        )
        for index, span in enumerate(self.spans):
            if wanted[index % len(wanted)]:
                slots.map(index, 0, span.block_ids)
                address = slots.address(index)
                self.spans[index] = dataclasses.replace(span, address=address)
        return slots

    def attend(
        self,
        team: Team,
        variant: int,
        window: int,
        share: bool,
        only: Sequence[int] = (),
    ) -> torch.Tensor:
        """[rows, heads * dim] as whole numbers, so that no bit is overlooked."""
        chosen = only or range(len(self.spans))
        spans = [self.spans[index] for index in chosen]
        inputs = [torch.cat([self.rows[index][part] for index in chosen]) for part in range(3)]
        attention = KernelAttention(
            team, self.memory, spans, (0, window), lambda: None, variant, share
        )
        return attention.attend(1, *inputs).view(torch.int32)


@compiled
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    branches=trees,
    size=st.sampled_from([16, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8]),
    heads=st.sampled_from([(1, 64), (2, 40), (2, 128), (7, 16), (12, 16)]),
    window=st.sampled_from([0, 0, 0, 24, 300]),
    in_slots=st.lists(st.booleans(), min_size=1, max_size=7),
)
def test_no_bit_depends_on_what_is_shared(
    branches: list[Branch],
    size: int,
    dtype: torch.dtype,
    heads: tuple[int, int],
    window: int,
    in_slots: list[bool],
) -> None:
    """On, off, and each sequence alone, by one thread and by several, by every variant."""
    assert LIBRARY is not None
    shared = SharedMemory(branches, dtype, size, *heads)
    slots = shared.into_slots(in_slots)
    teams = [Team(LIBRARY, count) for count in (1, 2, 3)]
    for variant in VARIANTS:
        alone = torch.cat(
            [
                shared.attend(teams[0], variant, window, False, [index])
                for index in range(len(shared.spans))
            ]
        )
        for team in teams:
            assert torch.equal(shared.attend(team, variant, window, False), alone)
            assert torch.equal(shared.attend(team, variant, window, True), alone)
    slots.close()


@compiled
@pytest.mark.parametrize(("num_threads", "together"), [(1, 6), (2, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_common_partition_is_read_once(num_threads: int, together: int, variant: int) -> None:
    """Slots whose tables name common blocks, over memory that is not: what the first sequence of a
    work item has is read for all of it. Several threads get items enough for each."""
    assert LIBRARY is not None
    team = Team(LIBRARY, num_threads)
    shared = SharedMemory([Branch(-1, 0, 600, 1)] * 6, torch.bfloat16, 16, 2, 64)
    slots = shared.into_slots([True])
    apart = shared.attend(team, variant, 0, True)
    tables = [span.block_ids for span in shared.spans]
    for index, span in enumerate(shared.spans):
        table = tables[0][:32] + tables[index][32:]
        shared.spans[index] = dataclasses.replace(span, block_ids=table)
    once = shared.attend(team, variant, 0, True)
    assert not torch.equal(once, apart)
    assert torch.equal(shared.attend(team, variant, 0, False), apart)
    for index in range(len(tables)):
        slots.unmap(index, 0)
        slots.map(index, 0, tables[index // together * together][:32] + tables[index][32:])
    assert torch.equal(shared.attend(team, variant, 0, False), once)
    slots.close()
