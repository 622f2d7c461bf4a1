"""A small stand-in for a scheduler: gives sequences blocks and makes step plans of them."""

from __future__ import annotations

import dataclasses
import itertools

from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, NewSequence, StepItem, StepPlan
from xllm.worker.executor import StepOutput
from xllm.worker.toy.executor import ToyExecutor


@dataclasses.dataclass
class DrivenSequence:
    seq: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    choice: int
    table: list[int]
    outputs: list[int]
    computed: int = 0
    new: NewSequence | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.outputs)


class PlanDriver:
    """Admits sequences and runs steps; blocks are never freed (tests are short)."""

    def __init__(self, executor: ToyExecutor, block_size: int = 16) -> None:
        self.executor = executor
        self.block_size = block_size
        self.steps = itertools.count()
        self.seqs = itertools.count()
        self.blocks = itertools.count(1)
        self.copies: list[tuple[int, int]] = []

    def admit(
        self, prompt, sampling, *, choice=0, outputs=(), cached=(), parent=-1, table=None
    ) -> DrivenSequence:
        """A new sequence; `cached`: blocks of another one that hold the beginning of its prompt.
        A fork gives `parent` and the whole table."""
        driven = DrivenSequence(next(self.seqs), tuple(prompt), sampling, choice, [], list(outputs))
        driven.table = list(cached) if table is None else list(table)
        driven.computed = len(cached) * self.block_size if table is None else len(prompt)
        driven.new = NewSequence(
            driven.seq,
            () if parent >= 0 else driven.prompt,
            tuple(outputs),
            sampling,
            choice,
            tuple(driven.table),
            parent,
        )
        return driven

    def run(self, work, *, ended=(), score_prompt=False) -> StepOutput:
        """One step over (sequence, number of tokens, number of samples) triples."""
        items, news = [], []
        for driven, count, samples in work:
            if driven.new is not None:
                news.append(driven.new)
                driven.new = None
            end = driven.computed + count
            need = -(-end // self.block_size) - len(driven.table)
            fresh = tuple(next(self.blocks) for _ in range(need))
            driven.table.extend(fresh)
            kind = ItemKind.DECODE if count == 1 else ItemKind.PREFILL
            items.append(
                StepItem(driven.seq, kind, driven.computed, count, fresh, samples, score_prompt)
            )
        copies, self.copies = tuple(self.copies), []
        plan = StepPlan(next(self.steps), tuple(items), tuple(news), tuple(ended), copies)
        output = self.executor.execute(plan)
        for (driven, count, _), tokens in zip(work, output.result.tokens, strict=True):
            driven.computed += count
            driven.outputs.extend(tokens[:1])
        self.executor.check()
        return output

    def decode(self, sequences, count: int) -> None:
        """`count` steps of one token for each."""
        for _ in range(count):
            self.run([(driven, driven.length - driven.computed, 1) for driven in sequences])
