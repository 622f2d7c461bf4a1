"""The numbers of a step as a device reads them: which token each row is, where it stands, where
its sequence's keys lie.

Pure. Decodes come first, so that they are one slice of the rows. A shape may be padded: rows and
sequences behind the real ones have address 0 and length 0, which kernels neither write nor read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xllm.errors import InvariantError
from xllm.worker.attention.plan import Span
from xllm.worker.execution.batch import BatchEntry, StepBatch
from xllm.worker.execution.pending_tokens import PENDING
from xllm.worker.graphs.choice import DrawKind, LaunchShape


@dataclasses.dataclass(frozen=True, slots=True)
class RowCounts:
    """How many rows, sequences, and sequences of one row, which come first. `verified`: behind
    them, sequences whose drafts are verified, as (rows of each, how many follow each other)."""

    num_rows: int
    num_sequences: int
    num_decodes: int
    verified: tuple[tuple[int, int], ...] = ()

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(rows of each, how many) of the sequences that are attended as decodes, from the first
        one on."""
        return (((1, self.num_decodes),) if self.num_decodes else ()) + self.verified

    @property
    def num_attended(self) -> int:
        """How many sequences these are."""
        return sum(number for _, number in self.runs)


@dataclasses.dataclass(frozen=True, slots=True)
class StepRows:
    """`sources`: where a pending token lies among the drawn ones, -1 for tokens that are known.
    `row_starts` has the end of the last sequence, too: its last entries are equal where sequences
    are padding."""

    counts: RowCounts
    token_ids: NDArray[np.int64]
    sources: NDArray[np.int64]
    row_addresses: NDArray[np.int64]
    addresses: NDArray[np.int64]
    positions: NDArray[np.int32]
    lengths: NDArray[np.int32]
    row_starts: NDArray[np.int32]
    read_rows: NDArray[np.int64]
    """The rows that tokens are drawn from, in the order of the batch's entries."""

    def shape(self, draws: DrawKind) -> LaunchShape:
        """What decides how it is launched."""
        counts = self.counts
        runs = counts.runs
        is_even = len(runs) == 1 and runs[0][1] == counts.num_sequences
        return LaunchShape(
            counts.num_rows,
            counts.num_sequences,
            runs[0][0] if is_even else 0,
            draws,
        )

    def alone(self) -> StepRows:
        """The rows without their sequences, as what lies between attentions sees them."""
        return dataclasses.replace(
            self,
            counts=RowCounts(self.counts.num_rows, 0, 0),
            addresses=self.addresses[:0],
            lengths=self.lengths[:0],
            row_starts=self.row_starts[:1],
            read_rows=self.read_rows[:0],
        )

    def padded(self, num_rows: int, num_sequences: int) -> StepRows:
        """The same with rows and sequences that are nobody's behind the real ones."""
        counts = self.counts
        if num_rows < counts.num_rows or num_sequences < counts.num_sequences:
            raise InvariantError(f"{counts} in {num_rows} rows of {num_sequences} sequences")
        more_rows = num_rows - counts.num_rows
        more = num_sequences - counts.num_sequences
        return dataclasses.replace(
            self,
            token_ids=np.pad(self.token_ids, (0, more_rows)),
            sources=np.pad(self.sources, (0, more_rows), constant_values=-1),
            row_addresses=np.pad(self.row_addresses, (0, more_rows)),
            positions=np.pad(self.positions, (0, more_rows)),
            addresses=np.pad(self.addresses, (0, more)),
            lengths=np.pad(self.lengths, (0, more)),
            row_starts=np.pad(self.row_starts, (0, more), mode="edge"),
        )


def nobodys_row() -> StepRows:
    """A decode of nobody: nothing is read or written for it."""
    wide, narrow = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int32)
    starts = np.array([0, 1], dtype=np.int32)
    unknown = np.full(1, -1, dtype=np.int64)
    return StepRows(RowCounts(1, 1, 1), wide, unknown, wide, wide, narrow, narrow, starts, wide[:0])


def decodes_first(batch: StepBatch) -> StepBatch:
    """The same batch with the entries of one row in front, behind them those whose drafts are
    verified, the fewest first; else in their order."""

    def place(at: int) -> tuple[int, int]:
        num_rows = batch.spans[at].num_rows
        if num_rows == 1:
            return 0, 0
        return (1, num_rows) if batch.entries[at].is_verified else (2, 0)

    order = sorted(range(len(batch.entries)), key=place)
    found = StepBatch(failed=batch.failed)
    for at in order:
        entry, span = batch.entries[at], batch.spans[at]
        found.entries.append(dataclasses.replace(entry, first_row=len(found.token_ids)))
        found.spans.append(span)
        first = entry.first_row
        found.token_ids.extend(batch.token_ids[first : first + span.num_rows])
    return found


def lay_out_rows(batch: StepBatch) -> StepRows:
    """The numbers of a batch whose decodes come first and whose spans all have an address."""
    spans = batch.spans
    counts = np.array([span.num_rows for span in spans], dtype=np.int32)
    starts = np.array([span.start for span in spans], dtype=np.int32)
    addresses = np.array([span.address for span in spans], dtype=np.int64)
    row_starts = np.zeros(len(spans) + 1, dtype=np.int32)
    np.cumsum(counts, out=row_starts[1:])
    num_rows = int(row_starts[-1])
    # A row's position is its sequence's first one and how far it is behind that row.
    shift = starts - row_starts[:-1]
    token_ids = np.array(batch.token_ids, dtype=np.int64)
    return StepRows(
        RowCounts(num_rows, len(spans), int((counts == 1).sum()), _verified(batch)),
        token_ids,
        _sources(batch.entries, token_ids),
        np.repeat(addresses, counts),
        addresses,
        np.arange(num_rows, dtype=np.int32) + np.repeat(shift, counts),
        starts + counts,
        row_starts,
        np.array(
            [row for one in batch.entries if one.item.num_samples for row in one.draw_rows],
            dtype=np.int64,
        ),
    )


def _verified(batch: StepBatch) -> tuple[tuple[int, int], ...]:
    """See RowCounts."""
    each = [
        span.num_rows
        for entry, span in zip(batch.entries, batch.spans, strict=True)
        if entry.is_verified and span.num_rows > 1
    ]
    return tuple((num_rows, len(list(run))) for num_rows, run in itertools.groupby(each))


def has_addresses(spans: Sequence[Span]) -> bool:
    """Whether every sequence of a step lies in a slot."""
    return all(span.address for span in spans)


def _sources(entries: Sequence[BatchEntry], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    sources = np.full(len(token_ids), -1, dtype=np.int64)
    pending = np.flatnonzero(token_ids == PENDING)
    if not len(pending):
        return sources
    wanted = set(pending.tolist())
    for entry in entries:
        start, end = entry.item.start, entry.item.start + entry.item.num_tokens
        for offset, source in entry.state.pending.between(start, end):
            sources[entry.first_row + offset] = source
            wanted.discard(entry.first_row + offset)
    if wanted:
        raise InvariantError(f"rows {sorted(wanted)} have tokens that nobody draws")
    return sources
