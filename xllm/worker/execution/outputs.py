"""What a step gave, item by item, and its form as a StepResult with frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm.protocol.step import StepResult
from xllm.worker.executor import StepOutput
from xllm.worker.sampling.logprobs import pack_logprobs
from xllm.worker.sampling.rows import LogprobTable


class StepOutputs:
    """Collects the outputs of one step's items; `pack` gives the message. An item that failed
    has neither tokens nor logprobs."""

    def __init__(self, num_items: int, failed: Sequence[tuple[int, str]]) -> None:
        self.tokens: list[tuple[int, ...]] = [()] * num_items
        self.failed = dict(failed)
        self.left_nan = False
        """Whether numbers that are not finite are in the pool, behind tokens that are sound."""
        self.expert_counts: torch.Tensor | None = None
        """int32 [layers, experts], of a model that has experts."""
        self.vectors: dict[int, bytes] = {}
        """By item: the vectors of texts that are complete, float32 of one size."""
        self._tables: dict[int, list[LogprobTable]] = {}

    def fail(self, index: int, reason: str) -> None:
        """Item `index` did not run."""
        self.failed[index] = reason
        self.tokens[index] = ()
        self._tables.pop(index, None)
        self.vectors.pop(index, None)

    def add_logprobs(self, index: int, table: LogprobTable) -> None:
        """Rows of item `index`: prompt scores first, drawn tokens after them."""
        self._tables.setdefault(index, []).append(table)

    def pack(self, step: int, duration_ns: int) -> StepOutput:
        """The result of the step and its frames: logprobs, expert counts, vectors."""
        tables = [self._tables.get(index, ()) for index in range(len(self.tokens))]
        logprob_rows, num_top, frames = pack_logprobs(tables) if self._tables else ((), -1, ())
        counts = self.expert_counts
        if counts is not None:
            frames = (*frames, counts.cpu().numpy().astype("<i4", copy=False).tobytes())
        pooled = tuple(sorted(self.vectors))
        if pooled:
            frames = (*frames, b"".join([self.vectors[index] for index in pooled]))
        result = StepResult(
            step,
            tuple(self.tokens),
            duration_ns,
            logprob_rows=logprob_rows,
            num_top=num_top,
            failed=tuple(sorted(self.failed.items())),
            expert_frames=int(counts is not None),
            pooled=pooled,
        )
        return StepOutput(result, frames)
