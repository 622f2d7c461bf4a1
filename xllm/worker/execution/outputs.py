"""What a step gave, item by item, and its form as a StepResult with logprob frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.protocol.step import StepResult
from xllm.worker.executor import StepOutput
from xllm.worker.sampling.rows import LogprobTable


class StepOutputs:
    """Collects the outputs of one step's items; `pack` gives the message. An item that failed
    has neither tokens nor logprobs."""

    def __init__(self, num_items: int, failed: Sequence[tuple[int, str]]) -> None:
        self.tokens: list[tuple[int, ...]] = [()] * num_items
        self.failed = dict(failed)
        self._tables: dict[int, list[LogprobTable]] = {}

    def fail(self, index: int, reason: str) -> None:
        """Item `index` did not run."""
        self.failed[index] = reason
        self.tokens[index] = ()
        self._tables.pop(index, None)

    def add_logprobs(self, index: int, table: LogprobTable) -> None:
        """Rows of item `index`: prompt scores first, drawn tokens after them."""
        self._tables.setdefault(index, []).append(table)

    def pack(self, step: int, duration_ns: int) -> StepOutput:
        """The result of the step and its frames. Rows that asked for fewer alternatives than
        others are padded with id -1 and logprob -inf."""
        failed = tuple(sorted(self.failed.items()))
        tokens = tuple(self.tokens)
        if not self._tables:
            return StepOutput(StepResult(step, tokens, duration_ns, failed=failed))
        found = [table for index in sorted(self._tables) for table in self._tables[index]]
        num_top = max(table.num_top for table in found)
        num_rows = [
            sum(table.num_rows for table in self._tables.get(index, ()))
            for index in range(len(tokens))
        ]
        result = StepResult(
            step,
            tokens,
            duration_ns,
            logprob_rows=tuple(num_rows),
            num_top=num_top,
            failed=failed,
        )
        return StepOutput(result, _frames(found, num_top))


def _frames(tables: Sequence[LogprobTable], num_top: int) -> tuple[bytes, bytes, bytes]:
    """ids and logprobs [rows, 1 + num_top] and ranks [rows], little-endian."""
    ids, logprobs = [], []
    for table in tables:
        padding = ((0, 0), (0, num_top - table.num_top))
        ids.append(np.pad(table.ids.numpy(), padding, constant_values=-1))
        logprobs.append(np.pad(table.logprobs.numpy(), padding, constant_values=-np.inf))
    ranks = [table.ranks.numpy() for table in tables]
    return (
        np.concatenate(ids).astype("<i4").tobytes(),
        np.concatenate(logprobs).astype("<f4").tobytes(),
        np.concatenate(ranks).astype("<i4").tobytes(),
    )
