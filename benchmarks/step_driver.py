"""Plans for an executor in this process: prompts, then decodes, each sequence in a slot of its own.

A stand-in for the master that costs next to nothing, so that what is timed is the executor. All
pages of a sequence are mapped by the plan that brings it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence

from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, MapPages, NewSequence, StepItem, StepPlan, StepResult
from xllm.worker.executor import LaunchedStep, LaunchingExecutor

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)


@dataclasses.dataclass
class Driven:
    """A sequence and how many of its tokens have their keys in memory."""

    seq: int
    prompt: tuple[int, ...]
    blocks: tuple[int, ...]
    slot: int
    computed: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)


class StepDriver:
    """Drives one executor. `ahead`: plans that are launched before the oldest one is waited for:
    2 is the asynchronous pipeline, 1 waits for each."""

    def __init__(self, executor: LaunchingExecutor, ahead: int = 2) -> None:
        self.executor = executor
        self.ready = executor.load(lambda loaded, total: None)
        self.ahead = ahead
        self._next_seq = 0
        self._next_step = 0
        self._ended: list[int] = []

    def sequences(self, prompts: Sequence[Sequence[int]], room: int) -> list[Driven]:
        """Sequences for prompts, with blocks for `room` more tokens each, in slots 0 and on.
        Those before them are ended. ValueError where they do not fit."""
        size = self.ready.block_size
        found, used = [], 0
        for slot, prompt in enumerate(prompts):
            count = -(-(len(prompt) + room) // size)
            self._next_seq += 1
            blocks = tuple(range(used, used + count))
            found.append(Driven(self._next_seq, tuple(prompt), blocks, slot))
            used += count
        if used > self.ready.num_blocks or (
            self.ready.num_slots and len(found) > self.ready.num_slots
        ):
            raise ValueError(
                f"{len(found)} sequences take {used} blocks; there are {self.ready.num_blocks} and "
                f"{self.ready.num_slots} slots"
            )
        return found

    def prefill(self, sequences: Sequence[Driven], chunk: int) -> float:
        """Compute the prompts, `chunk` tokens a step, and draw the first tokens: seconds."""
        began = time.perf_counter()
        for plan in self._prefill_plans(sequences, chunk):
            self._take(sequences, plan, self.executor.launch(plan).wait().result)
        return time.perf_counter() - began

    def decode(self, sequences: Sequence[Driven], num_steps: int) -> list[float]:
        """Decode all of them together: seconds from each step's end to the next one's, of
        `num_steps` steps behind the first."""
        ends: list[float] = []
        under_way: deque[tuple[StepPlan, LaunchedStep]] = deque()
        for number in range(num_steps + 1):
            plan = self._decode_plan(sequences)
            self.executor.arrive(plan)
            under_way.append((plan, self.executor.launch(plan)))
            while len(under_way) >= self.ahead or (number == num_steps and under_way):
                oldest, launched = under_way.popleft()
                self._take(sequences, oldest, launched.wait().result)
                ends.append(time.perf_counter())
        return [later - earlier for earlier, later in itertools.pairwise(ends)]

    def end(self, sequences: Sequence[Driven]) -> None:
        """Forget them, with the next plan."""
        self._ended += [one.seq for one in sequences]

    def _prefill_plans(self, sequences: Sequence[Driven], chunk: int) -> Iterator[StepPlan]:
        news = [
            NewSequence(one.seq, one.prompt, (), GREEDY, 0, one.blocks, slot=self._slot(one))
            for one in sequences
        ]
        maps = [MapPages(one.slot, 0, one.blocks) for one in sequences if self.ready.num_slots]
        while True:
            items, left = [], chunk
            for one in sequences:
                count = min(len(one.prompt) - one.computed, left)
                if count > 0:
                    is_last = one.computed + count == len(one.prompt)
                    items.append(
                        StepItem(one.seq, ItemKind.PREFILL, one.computed, count, (), int(is_last))
                    )
                    one.computed += count
                    left -= count
            if not items:
                return
            yield self._plan(items, news, maps)
            news, maps = [], []

    def _decode_plan(self, sequences: Sequence[Driven]) -> StepPlan:
        items = []
        for one in sequences:
            items.append(StepItem(one.seq, ItemKind.DECODE, one.computed, 1))
            one.computed += 1
        return self._plan(items, (), ())

    def _plan(
        self, items: Sequence[StepItem], news: Sequence[NewSequence], maps: Sequence[MapPages]
    ) -> StepPlan:
        self._next_step += 1
        ended, self._ended = tuple(self._ended), []
        return StepPlan(self._next_step, tuple(items), tuple(news), ended, maps=tuple(maps))

    def _slot(self, one: Driven) -> int:
        return one.slot if self.ready.num_slots else -1

    def _take(self, sequences: Sequence[Driven], plan: StepPlan, result: StepResult) -> None:
        if result.failed:
            raise RuntimeError(f"step {plan.step}: {result.failed[0][1]}")
        by_seq = {one.seq: one for one in sequences}
        for item, tokens in zip(plan.items, result.tokens, strict=True):
            by_seq[item.seq].tokens.extend(tokens)
