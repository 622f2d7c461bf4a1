"""Layers in halves, for ranks that hold a part of each: behind every half the parts are summed.

A step may be split into micro-batches that take turns, so that the sum of one is under way while
the other one is computed. A row's numbers do not depend on the split: rows are treated alone but
for attention, and the keys of earlier rows of a sequence are written before later ones look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from xllm.worker.attention.plan import Span
from xllm.worker.collectives.ranks import PendingSum, Ranks
from xllm.worker.kernels.attention import StepArrays
from xllm.worker.kernels.fused import FusedLayer
from xllm.worker.layers.decoder import Attention
from xllm.worker.layers.rotary import RotaryTables
from xllm.worker.models.model import NativeModel


class MicroBatch(Protocol):
    """Some rows of a step. Half 2 i is the attention of layer i, half 2 i + 1 its MLP."""

    @property
    def hidden(self) -> torch.Tensor:
        """The rows' state [rows, hidden], which the sums are added to in place."""

    def compute(self, half: int) -> torch.Tensor:
        """This rank's part of what a half adds to the state."""


class FusedBatch:
    """Rows through the compiled kernels."""

    def __init__(
        self, layers: Sequence[FusedLayer], hidden: torch.Tensor, arrays: StepArrays
    ) -> None:
        self._layers = layers
        self._arrays = arrays
        self.hidden = hidden

    def compute(self, half: int) -> torch.Tensor:
        """See MicroBatch."""
        layer = self._layers[half // 2]
        part = torch.empty_like(self.hidden)
        run = layer.mlp_half if half % 2 else layer.attention_half
        run(self.hidden, self._arrays, part)
        return part


class TorchBatch:
    """Rows through a model's layers in torch."""

    def __init__(
        self,
        model: NativeModel,
        hidden: torch.Tensor,
        tables: RotaryTables,
        attention: Attention,
    ) -> None:
        self._model = model
        self._tables = tables
        self._attention = attention
        self.hidden = hidden

    def compute(self, half: int) -> torch.Tensor:
        """See MicroBatch."""
        if half % 2:
            return self._model.mlp_half(half // 2, self.hidden, self._attention)
        return self._model.attention_half(half // 2, self.hidden, self._tables, self._attention)


def split_spans(spans: Sequence[Span], least_rows: int) -> list[list[Span]]:
    """The spans as two micro-batches of like many rows, at least `least_rows` each, in order; a
    span may be cut. One where there are not so many rows, or `least_rows` is 0."""
    total = sum(span.num_rows for span in spans)
    if not least_rows or total < 2 * least_rows:
        return [list(spans)]
    room = total // 2
    first: list[Span] = []
    second: list[Span] = []
    for span in spans:
        count = min(span.num_rows, room)
        room -= count
        if count:
            first.append(_part(span, 0, count))
        if count < span.num_rows:
            second.append(_part(span, count, span.num_rows - count))
    return [first, second]


def run_halves(
    batches: Sequence[MicroBatch],
    num_layers: int,
    ranks: Ranks,
    before: Callable[[int], None],
    after: Callable[[int], None],
) -> None:
    """Take all batches through all layers. `before(i)` and `after(i)`: layer i is about to begin,
    has been computed for all rows; with several batches the next one has begun by then."""
    pending: list[PendingSum | None] = [None] * len(batches)
    for half in range(2 * num_layers + 1):
        for number, batch in enumerate(batches):
            under_way = pending[number]
            if under_way is not None:
                batch.hidden.add_(under_way.wait())
            is_last = number == len(batches) - 1
            if is_last and half and not half % 2:
                after(half // 2 - 1)
            if half == 2 * num_layers:
                continue
            if number == 0 and not half % 2:
                before(half // 2)
            pending[number] = ranks.begin_sum(batch.compute(half))


def _part(span: Span, first: int, count: int) -> Span:
    if count == span.num_rows:
        return span
    return Span(span.start + first, count, span.block_ids, span.address)
