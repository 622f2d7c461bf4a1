"""Which mode a step runs in: decided from its shape alone (report, section 4.2, table 1).

A full graph is one launch for a whole decode step; its attention reads lengths and addresses from
tensors and has programs for the longest sequence, so that one capture serves every step of a
bucket, however long its sequences are. A partial graph leaves out the
attention, whose grid depends on how rows fall to sequences: everything between two attentions has
the number of rows as its only dimension. What fits neither is launched operator by operator.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum

from xllm.worker.graphs.buckets import Buckets, batch_buckets, row_buckets


class GraphMode(StrEnum):
    """How a step is launched."""

    FULL = "full"
    PARTIAL = "partial"
    EAGER = "eager"


class DrawKind(StrEnum):
    """What a step draws on the device: nothing (the host draws, or nobody), or tokens, with
    filters (top-k, top-p, min-p) or without."""

    NONE = "none"
    PLAIN = "plain"
    FILTERED = "filtered"


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchShape:
    """What of a step decides its mode. `rows_each`: rows of every sequence where they are all
    equal, else 0."""

    num_rows: int
    num_sequences: int
    rows_each: int
    draws: DrawKind = DrawKind.NONE


@dataclasses.dataclass(frozen=True, slots=True)
class GraphKey:
    """What a capture is for. A full graph: rows in all and of each sequence, and what it draws
    behind the layers. A partial one: rows; the other is 0. Eager: both 0."""

    mode: GraphMode
    num_rows: int = 0
    rows_each: int = 0
    draws: DrawKind = DrawKind.NONE

    @property
    def num_sequences(self) -> int:
        """Of a full graph."""
        return self.num_rows // self.rows_each if self.rows_each else 0


EAGER = GraphKey(GraphMode.EAGER)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphLimits:
    """Bounds of what is captured; 0 turns a mode off."""

    max_batch: int = 256
    max_rows: int = 2048
    max_rows_each: int = 8


class GraphChooser:
    """Chooses the key of each step. Pure: equal shapes have equal keys."""

    def __init__(self, limits: GraphLimits) -> None:
        self._limits = limits
        self._batches = batch_buckets(limits.max_batch)
        self._rows: Buckets = row_buckets(limits.max_rows)

    def choose(self, shape: LaunchShape) -> tuple[GraphKey, ...]:
        """The keys to try, best first; the last one is always EAGER. A decode that draws is best
        launched whole; where that cannot be captured, its draw comes behind its layers."""
        keys = [self._full(shape, shape.draws), self._partial(shape)]
        if shape.draws is not DrawKind.NONE:
            keys.insert(1, self._full(shape, DrawKind.NONE))
        return (*(key for key in keys if key is not None), EAGER)

    def warm_keys(self) -> tuple[GraphKey, ...]:
        """What is captured before the first request: decodes of every batch that draw without
        filters, and of powers of two that draw with them, the largest first, for its memory serves
        the smaller ones."""
        keys = []
        for batch in reversed(self._batches.sizes):
            keys.append(GraphKey(GraphMode.FULL, batch, 1, DrawKind.PLAIN))
            if not batch & (batch - 1):
                keys.append(GraphKey(GraphMode.FULL, batch, 1, DrawKind.FILTERED))
        return tuple(keys)

    def _full(self, shape: LaunchShape, draws: DrawKind) -> GraphKey | None:
        if not 0 < shape.rows_each <= self._limits.max_rows_each:
            return None
        batch = self._batches.of(shape.num_sequences)
        if not batch:
            return None
        return GraphKey(GraphMode.FULL, batch * shape.rows_each, shape.rows_each, draws)

    def _partial(self, shape: LaunchShape) -> GraphKey | None:
        rows = self._rows.of(shape.num_rows)
        return GraphKey(GraphMode.PARTIAL, rows) if rows else None
