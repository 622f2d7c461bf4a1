"""Which keys each row of a step sees: index tensors and masks, planned once a step and window.

Rows are laid out span by span. A span of one row is a decode: decodes of similar length are put
into one padded batch. Longer spans are prefill chunks: those from position 0 are batched with
others of similar length, the rest is attended one by one. Padding is the sequence's own first
block or row, masked: no other sequence's numbers are ever read.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence

import torch

_MAX_GROUP_TOKENS = 1 << 15
"""KV tokens that one padded batch of decodes gathers at most (a longer sequence goes alone)."""

_MAX_CHUNK_ROWS = 512
_MIN_CHUNK_ROWS = 32
_MAX_MASK_NUMBERS = 1 << 24
"""Rows of a prefill chunk that are attended at a time: what a mask may hold bounds them."""

_MAX_FRESH_ROWS = 256
"""A fresh prompt of more rows is attended alone: nothing is gained by padding it."""

_MAX_FRESH_PART_ROWS = 1 << 11
"""Rows of a fresh prompt that are attended in one go; those behind them see them in the pool."""

_MAX_FRESH_GROUP_ROWS = 1 << 12
"""Rows of one padded batch of fresh prompts at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence: positions [start, start + num_rows), over a block table (of 64-bit
    numbers, type code "q") that reaches at least to their end. `address`: where the blocks lie
    side by side, the first of the table first (a slot's); 0: nowhere."""

    start: int
    num_rows: int
    block_ids: array[int]
    address: int = 0

    @property
    def end(self) -> int:
        """Tokens of KV once the rows are written."""
        return self.start + self.num_rows


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes attended together: `rows` [batch] (int64, None: all rows of the step in order),
    blocks [batch * width], additive mask [batch, 1, 1, width * block_size]."""

    rows: torch.Tensor | None
    batch: int
    width: int
    block_ids: torch.Tensor
    mask: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class SeenKeys:
    """The keys that rows of one sequence see: blocks [width] hold `num_columns` tokens, of which
    row r stands at column `first` + r and sees itself and what is before it, `window` of them
    in all (0: every one)."""

    block_ids: torch.Tensor
    first: int
    num_columns: int
    window: int

    def mask(self, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive [num_rows, num_columns]. Made when it is needed and not kept: those of all
        parts of a step would take more memory than the step's keys."""
        device = self.block_ids.device
        if self.window:
            columns = torch.arange(self.num_columns, device=device)
            own = torch.arange(self.first, self.first + num_rows, device=device)[:, None]
            return _additive((columns > own) | (columns <= own - self.window), dtype)
        mask = torch.zeros((num_rows, self.num_columns), dtype=dtype, device=device)
        tail = mask[:, self.first :]
        tail.fill_(float("-inf")).triu_(1)
        return mask


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillPart:
    """Rows [first_row, first_row + num_rows) of one sequence. Without `seen` they see each other
    alone, causally, and nothing is gathered."""

    first_row: int
    num_rows: int
    seen: SeenKeys | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class FreshGroup:
    """Prompts from their first token on, attended together, causally: `padded` [batch * width]
    names the row behind each place, `rows` the rows that are real and `places` theirs."""

    batch: int
    width: int
    padded: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class WindowPlan:
    """The work of one step for layers of one window."""

    decodes: tuple[DecodeGroup, ...]
    fresh: tuple[FreshGroup, ...]
    prefills: tuple[PrefillPart, ...]


def write_slots(spans: Sequence[Span], block_size: int) -> list[int]:
    """The slot (block * block_size + offset) of every row, in order."""
    slots: list[int] = []
    for span in spans:
        ids = span.block_ids
        if span.num_rows == 1:
            block, offset = divmod(span.start, block_size)
            slots.append(ids[block] * block_size + offset)
            continue
        position = span.start
        while position < span.end:
            block, offset = divmod(position, block_size)
            count = min(block_size - offset, span.end - position)
            first = ids[block] * block_size + offset
            slots.extend(range(first, first + count))
            position += count
    return slots


def plan_window(
    spans: Sequence[Span],
    window: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> WindowPlan:
    """The plan of a step's spans for one window (0: full attention)."""
    planner = _Planner(window, block_size, dtype, device)
    decodes: list[tuple[int, Span]] = []
    fresh: dict[int, list[tuple[int, Span]]] = {}
    prefills: list[PrefillPart] = []
    row = 0
    for span in spans:
        if span.num_rows == 1:
            decodes.append((row, span))
        elif planner.is_fresh(span) and span.num_rows <= _MAX_FRESH_ROWS:
            fresh.setdefault((span.num_rows - 1).bit_length(), []).append((row, span))
        else:
            prefills.extend(planner.prefill(row, span))
        row += span.num_rows
    fresh_groups: list[FreshGroup] = []
    for exponent, items in sorted(fresh.items()):
        for part in _parts(items, _MAX_FRESH_GROUP_ROWS >> exponent):
            if len(part) == 1:
                prefills.extend(planner.prefill(*part[0]))
            else:
                fresh_groups.append(planner.fresh(part))
    groups = tuple(planner.decode(part, row) for part in planner.grouped(decodes))
    return WindowPlan(groups, tuple(fresh_groups), tuple(prefills))


class _Planner:
    def __init__(
        self, window: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._window = window
        self._block_size = block_size
        self._dtype = dtype
        self._device = device

    def _visible_blocks(self, first_position: int, end: int) -> tuple[int, int]:
        """Blocks [first, last) that rows from `first_position` to `end` may see."""
        first = max(first_position - self._window + 1, 0) if self._window else 0
        return first // self._block_size, -(-end // self._block_size)

    def grouped(self, decodes: list[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
        """Decodes by the power of two over their block count: padding at most doubles them."""
        buckets: dict[int, list[tuple[int, Span]]] = {}
        for item in decodes:
            first, last = self._visible_blocks(item[1].start, item[1].end)
            buckets.setdefault((last - first - 1).bit_length(), []).append(item)
        parts: list[list[tuple[int, Span]]] = []
        for exponent, items in sorted(buckets.items()):
            size = max(_MAX_GROUP_TOKENS // (self._block_size << exponent), 1)
            parts.extend(_parts(items, size))
        return parts

    def is_fresh(self, span: Span) -> bool:
        """Whether the rows of a span see each other alone, and the window cuts nothing off."""
        return span.start == 0 and (not self._window or span.num_rows <= self._window)

    def fresh(self, items: list[tuple[int, Span]]) -> FreshGroup:
        width = max(span.num_rows for _, span in items)
        padded: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        for number, (row, span) in enumerate(items):
            own = range(row, row + span.num_rows)
            padded.extend((*own, *[row] * (width - span.num_rows)))
            rows.extend(own)
            places.extend(range(number * width, number * width + span.num_rows))
        return FreshGroup(
            len(items), width, self._index(padded), self._index(rows), self._index(places)
        )

    def decode(self, items: list[tuple[int, Span]], num_rows: int) -> DecodeGroup:
        visible: list[tuple[int, int]] = []
        bounds: list[tuple[int, int]] = []
        for _, span in items:
            first, last = self._visible_blocks(span.start, span.end)
            visible.append((first, last))
            origin = first * self._block_size
            low = max(span.end - self._window, 0) if self._window else 0
            bounds.append((low - origin, span.end - origin))
        width = max(last - first for first, last in visible)
        flat = array("q")
        for (_, span), (first, last) in zip(items, visible, strict=True):
            flat += span.block_ids[first:last]
            flat += span.block_ids[first : first + 1] * (width - last + first)
        rows = [row for row, _ in items]
        return DecodeGroup(
            None if len(rows) == num_rows else self._index(rows),
            len(items),
            width,
            _tensor(flat, self._device),
            self._decode_mask(bounds, width * self._block_size)[:, None, None, :],
        )

    def _decode_mask(self, bounds: list[tuple[int, int]], num_columns: int) -> torch.Tensor:
        """Additive [batch, columns]: each row sees the columns [low, high) of its bounds. Only
        the columns that some row does not see are looked at."""
        mask = torch.zeros((len(bounds), num_columns), dtype=self._dtype, device=self._device)
        limits = torch.tensor(bounds, dtype=torch.int64, device=self._device)
        columns = torch.arange(num_columns, device=self._device)
        last_low = max(low for low, _ in bounds)
        if last_low:
            mask[:, :last_low].masked_fill_(columns[:last_low] < limits[:, :1], float("-inf"))
        first_high = min(high for _, high in bounds)
        mask[:, first_high:].masked_fill_(columns[first_high:] >= limits[:, 1:], float("-inf"))
        return mask

    def prefill(self, row: int, span: Span) -> list[PrefillPart]:
        parts = []
        begun = 0
        if self.is_fresh(span):
            begun = min(span.num_rows, _MAX_FRESH_PART_ROWS)
            parts.append(PrefillPart(row, begun))
        size = max(min(_MAX_CHUNK_ROWS, _MAX_MASK_NUMBERS // span.end), _MIN_CHUNK_ROWS)
        for offset in range(begun, span.num_rows, size):
            count = min(size, span.num_rows - offset)
            start = span.start + offset
            first, last = self._visible_blocks(start, start + count)
            seen = SeenKeys(
                _tensor(span.block_ids[first:last], self._device),
                start - first * self._block_size,
                (last - first) * self._block_size,
                self._window,
            )
            parts.append(PrefillPart(row + offset, count, seen))
        return parts

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def _tensor(numbers: array[int], device: torch.device) -> torch.Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64).to(device)


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))


def _parts(items: list[tuple[int, Span]], size: int) -> list[list[tuple[int, Span]]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
