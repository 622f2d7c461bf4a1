"""Steps that were launched and whose tokens are not in their sequences yet.

Two threads meet here. The collector's waits for a step's tokens and makes its output; the engine's
settles what was collected into the sequences before it builds the next batch, and may collect
itself where it cannot go on without. Invariants: steps are collected and settled in the order of
their launches; a sequence that failed in one fails in all behind it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from xllm.errors import DeviceLostError, EngineError, InvariantError
from xllm.worker.execution.batch import BatchEntry
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.execution.sequences import SequenceTable
from xllm.worker.executor import StepOutput
from xllm.worker.platform.copies import HostCopy
from xllm.worker.verifying import num_accepted

MAX_UNDER_WAY = 3
"""Steps whose tokens the host has not seen: the master plans one ahead; one more may be on its way
back."""
NOT_FINITE = "the model's output is not a number (an overflow of its type?)"


class StepUnderWay:
    """One step. `drawn` entries have a number for each row that they draw from, in the order of
    the copy's numbers, of which there may be more; a negative one says that the model's output was
    not finite. `kept`: what of it each of them keeps; nothing where its first one is negative,
    which a draft may have done: see `verifying`."""

    def __init__(
        self,
        board: StepsUnderWay,
        step: int,
        entries: Sequence[BatchEntry],
        drawn: Sequence[BatchEntry],
        copy: HostCopy,
        outputs: StepOutputs,
    ) -> None:
        self.entries = entries
        self.drawn = drawn
        self.outputs = outputs
        self.kept: list[tuple[int, ...]] = []
        self.left_nan = False
        self.error: Exception | None = None
        self.is_collected = False
        self.duration_ns = 0
        self._board = board
        self._step = step
        self._copy = copy
        self._began_ns = time.perf_counter_ns()

    @property
    def is_done(self) -> bool:
        """See LaunchedStep."""
        return self.is_collected or self._copy.is_done()

    def wait(self) -> StepOutput:
        """See LaunchedStep."""
        self._board.collect(self)
        if self.error is not None:
            raise self.error
        return self.outputs.pack(self._step, self.duration_ns)

    def receive(self, failed: dict[int, str], before_ns: int) -> int:
        """Wait for the tokens and write the output; `failed`: sequences that failed before, and
        now. When it was done; `before_ns`: when the step before it was."""
        try:
            numbers: list[int] = self._copy.wait().tolist()
        except EngineError as error:
            self.error = DeviceLostError(f"the device is lost: {error.message}")
            self.error.__cause__ = error
        except Exception as error:  # `wait` raises it: the steps behind this one go on
            self.error = error
        else:
            self._take(numbers, failed)
        ended_ns = time.perf_counter_ns()
        self.duration_ns = ended_ns - max(self._began_ns, before_ns)
        self.is_collected = True
        return ended_ns

    def _take(self, numbers: Sequence[int], failed: dict[int, str]) -> None:
        at = 0
        for entry in self.drawn:
            seq, end = entry.item.seq, at + len(entry.draw_rows)
            drawn = tuple(itertools.takewhile(lambda token: token >= 0, numbers[at:end]))
            self.left_nan = self.left_nan or len(drawn) < end - at
            at = end
            kept = drawn[: num_accepted(entry.drafts, drawn)]
            self.kept.append(kept)
            if not kept and not entry.drafts:
                failed.setdefault(seq, NOT_FINITE)
            if seq in failed:
                self.outputs.fail(entry.index, failed[seq])
            else:
                self.outputs.tokens[entry.index] = kept


class StepsUnderWay:
    """The steps of one engine, oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[StepUnderWay] = deque()
        self._failed: dict[int, str] = {}
        self._ended_ns = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: StepUnderWay) -> None:
        """The last one to be launched. On the engine's thread."""
        self._steps.append(step)

    def collect(self, last: StepUnderWay) -> None:
        """Wait for a step and those before it. On any thread."""
        for step in tuple(self._steps):
            # One step at a time: who waits for an older one is not kept by a younger.
            with self._lock:
                if not step.is_collected:
                    self._ended_ns = step.receive(self._failed, self._ended_ns)
            if step is last:
                return
        if not last.is_collected:
            raise InvariantError("a step was settled before it was collected")

    def settle(self, table: SequenceTable) -> bool:
        """Bring the tokens of collected steps into their sequences; whether one of them left
        numbers that are not finite. On the engine's thread."""
        has_failed = False
        while self._steps and self._steps[0].is_collected:
            step = self._steps.popleft()
            if step.error is not None:
                for entry in step.entries:
                    _refuse(table, entry, "a step of it failed")
                continue
            has_failed = has_failed or step.left_nan
            for entry, kept in zip(step.drawn, step.kept, strict=True):
                _settle(entry, kept)
            for index, reason in step.outputs.failed.items():
                for entry in step.entries:
                    if entry.index == index:
                        _refuse(table, entry, reason)
        alive = {entry.item.seq for step in self._steps for entry in step.entries}
        for seq in [seq for seq in tuple(self._failed) if seq not in alive]:
            self._failed.pop(seq, None)
        return has_failed

    def settle_oldest(self, table: SequenceTable) -> bool:
        """Wait for the oldest one, and settle. On the engine's thread."""
        if self._steps:
            self.collect(self._steps[0])
        return self.settle(table)

    def drain(self, table: SequenceTable) -> bool:
        """Wait for all of them, and settle. On the engine's thread."""
        if self._steps:
            self.collect(self._steps[-1])
        return self.settle(table)

    def needs(self, block_size: int) -> dict[int, int]:
        """How many leading blocks of which slots they touch."""
        found: dict[int, int] = {}
        for step in self._steps:
            for entry in step.entries:
                slot, item = entry.state.slot, entry.item
                if slot >= 0:
                    count = -(-(item.start + item.num_tokens) // block_size)
                    found[slot] = max(count, found.get(slot, 0))
        return found


def _settle(entry: BatchEntry, kept: tuple[int, ...]) -> None:
    """The tokens of an entry are known; one that has none fails."""
    if not entry.is_verified:
        entry.state.settle(kept[0] if kept else 0)
        return
    entry.state.is_open = False
    for token in kept:
        entry.state.append(token)


def _refuse(table: SequenceTable, entry: BatchEntry, reason: str) -> None:
    """A sequence failed, unless a plan has ended it since."""
    if table.knows(entry.item.seq):
        table.refuse(entry.item.seq, reason)


def most_needed(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    """The larger of what two need of each slot."""
    return {slot: max(one.get(slot, 0), other.get(slot, 0)) for slot in {*one, *other}}
