"""Log-probabilities out of a step result's frames.

Frames: int32 ids and float32 logprobs of shape [rows, 1 + num_top], the drawn (or prompt) token
first, and int32 ranks [rows]; `logprob_rows` says how many rows each item of the plan has.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from xllm.errors import BadMessageError
from xllm.protocol.sampling import TokenLogprobs
from xllm.protocol.step import StepResult


class LogprobFrames:
    """The rows of one step's result. BadMessageError if the frames' sizes contradict it, or if
    it does not count rows for each of `num_items` items."""

    __slots__ = ("_first_row", "_ids", "_logprobs", "_ranks", "_width")

    def __init__(self, result: StepResult, frames: AbstractSequence[bytes], num_items: int) -> None:
        counts = result.logprob_rows
        if len(counts) != num_items or min(counts, default=0) < 0:
            raise BadMessageError(
                f"step {result.step} has {num_items} items and counts rows as {counts[:20]}"
            )
        self._width = 1 + result.num_top
        num_rows = sum(counts)
        cells = num_rows * self._width
        sizes = [len(frame) for frame in frames[:3]]
        if sizes != [4 * cells, 4 * cells, 4 * num_rows]:
            raise BadMessageError(
                f"step {result.step} announces {num_rows} logprob rows of {self._width} and "
                f"its frames have {sizes} bytes"
            )
        self._ids = memoryview(frames[0]).cast("i")
        self._logprobs = memoryview(frames[1]).cast("f")
        self._ranks = memoryview(frames[2]).cast("i")
        self._first_row = [0]
        for count in counts:
            self._first_row.append(self._first_row[-1] + count)

    def num_rows(self, item: int) -> int:
        """Rows of the plan's item of that index."""
        return self._first_row[item + 1] - self._first_row[item]

    def read(self, item: int, row: int, num_alternatives: int) -> TokenLogprobs:
        """Row `row` of an item, with at most so many alternatives."""
        index = self._first_row[item] + row
        start = index * self._width
        first = start + 1
        last = min(first + num_alternatives, start + self._width)
        return TokenLogprobs(
            token_id=self._ids[start],
            logprob=self._logprobs[start],
            rank=self._ranks[index],
            top_ids=tuple(self._ids[first:last]),
            top_logprobs=tuple(self._logprobs[first:last]),
        )
