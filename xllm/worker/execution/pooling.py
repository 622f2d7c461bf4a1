"""From the last layer's output to vectors: the model's last norm, pooling, length one.

A text that is pooled by the mean keeps the sum of its rows from step to step. Invariant: a
vector's bits depend on its rows alone, not on how they were cut into steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from xllm.protocol.step import StepPlan
from xllm.worker.execution.batch import BatchEntry, StepBatch
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.models.model import DecoderModel

_SLICE_ROWS = 256
"""Rows at a time: bounds the memory of their sum in fp64."""


@dataclasses.dataclass(slots=True)
class _Text:
    """A sequence that is to be a vector: how, and the sum of its rows so far, fp64 [hidden]."""

    is_mean: bool
    total: torch.Tensor | None = None
    num_rows: int = 0


class Pooler:
    """Makes the vectors of steps with one model. `begin` each plan, then `pool` what ran of it.
    `tick` is called after each bounded piece of work."""

    def __init__(self, model: DecoderModel, tick: Callable[[], None]) -> None:
        self._model = model
        self._tick = tick
        self._texts: dict[int, _Text] = {}

    @property
    def num_texts(self) -> int:
        """Sequences that are to be vectors and were not ended."""
        return len(self._texts)

    def begin(self, plan: StepPlan) -> None:
        """Learn and forget."""
        for new in plan.new:
            if new.pooling:
                self._texts[new.seq] = _Text(new.pooling == "mean")
        for seq in plan.ended:
            self._texts.pop(seq, None)

    def forget(self) -> None:
        """Nothing is known any more."""
        self._texts.clear()

    def pool(self, batch: StepBatch, hidden: torch.Tensor, outputs: StepOutputs) -> None:
        """Take in the rows of every entry that has not failed; `hidden` [rows, hidden] is the last
        layer's output. Texts that are complete have their vectors in `outputs`, or fail where
        those are no numbers."""
        complete: list[BatchEntry] = []
        rows: list[torch.Tensor] = []
        for entry in batch.entries:
            text = self._texts.get(entry.item.seq)
            if text is None or entry.index in outputs.failed:
                continue
            if text.is_mean:
                self._add(text, hidden[entry.first_row : entry.last_row + 1])
            if entry.item.start + entry.item.num_tokens < entry.state.length:
                continue
            complete.append(entry)
            if text.total is not None:
                rows.append(text.total / text.num_rows)
            else:
                last = hidden[entry.last_row : entry.last_row + 1]
                rows.append(self._model.normalised(last)[0].double())
        if not complete:
            return
        vectors = torch.nn.functional.normalize(torch.stack(rows), dim=-1).float().cpu()
        self._tick()
        finite = vectors.isfinite().all(dim=-1).tolist()
        for entry, vector, is_finite in zip(complete, vectors, finite, strict=True):
            if is_finite:
                outputs.vectors[entry.index] = vector.numpy().astype("<f4", copy=False).tobytes()
            else:
                outputs.fail(entry.index, "the text's vector is not made of numbers")

    def _add(self, text: _Text, hidden: torch.Tensor) -> None:
        """Add rows to a text's sum, one after the other: a sum in any other order would have
        other bits where a prompt is cut elsewhere."""
        for at in range(0, len(hidden), _SLICE_ROWS):
            rows = self._model.normalised(hidden[at : at + _SLICE_ROWS]).double()
            if text.total is not None:
                rows = torch.cat((text.total[None], rows))
            text.total = rows.cumsum(0)[-1].clone()
            self._tick()
        text.num_rows += len(hidden)
