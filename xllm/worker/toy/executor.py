"""The toy engine: runs step plans without a model.

It writes each token and position into its KV pages and draws every token from what it reads back
(see `stream`), so that lost, doubled, reordered and foreign tokens, and stale, foreign or
misplaced pages change the stream. Stop ids, limits and penalties are not its business: streams run
on. Invariant: what an item gives depends on its sequence alone, never on the rest of the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from xllm.config.models import each_model
from xllm.config.settings import Settings
from xllm.errors import EngineError, InvariantError, XllmError
from xllm.protocol.step import (
    ItemKind,
    KvGroup,
    NewSequence,
    StepItem,
    StepPlan,
    StepResult,
    WorkerReady,
)
from xllm.worker.context import fit_context
from xllm.worker.executor import Executor, LoadObserver, StepOutput
from xllm.worker.hosting import ModelHost
from xllm.worker.item_options import check_options
from xllm.worker.loader.pooling import GENERATES, ModelTask, resolve_task
from xllm.worker.memory.virtual import available_mappings
from xllm.worker.rank_board import RankBoard
from xllm.worker.toy.faults import NO_FAULTS, ToyFaults
from xllm.worker.toy.pages import PageArena, PageStatistics
from xllm.worker.toy.scores import wanted_scores
from xllm.worker.toy.sequence import ToySequence
from xllm.worker.toy.slots import ToySlots
from xllm.worker.toy.stream import (
    DIGEST_BYTES,
    ENTRY_BYTES,
    draw_cheap,
    draw_token,
)
from xllm.worker.toy.vectors import WIDTH, VectorFrame
from xllm.worker.toy.vocabulary import toy_vocabulary
from xllm.worker.verifying import check_verify, num_accepted

DEFAULT_MODEL_LEN = 8192
_LAST_KIND = int(ItemKind.VERIFY)
_VERIFY = int(ItemKind.VERIFY)
SLICE_S = 0.05
"""A long step bumps the progress counter this often, as a model's layers do."""


@dataclasses.dataclass(frozen=True)
class ToyStatistics:
    """Counts since the start."""

    num_sequences: int
    num_steps: int
    pages: PageStatistics


class ToyExecutor:
    """An Executor (see `xllm.worker.executor`) whose streams `stream.predict` knows."""

    def __init__(
        self,
        *,
        model: str = "toy",
        model_dir: str = "",
        max_model_len: int = 0,
        num_blocks: int = 4096,
        block_size: int = 16,
        step_s: float = 0.0,
        token_s: float = 0.0,
        memory: bool = True,
        rank: int = 0,
        num_slots: int = 0,
        faults: ToyFaults = NO_FAULTS,
        task: ModelTask = GENERATES,
        arena: PageArena | None = None,
    ) -> None:
        """`arena`: pages that other models use too, in place of its own."""
        self.counter = 0
        self._task = task
        self._model = model
        self._model_dir = model_dir
        self._max_model_len = max_model_len
        self._step_s = step_s
        self._token_s = token_s
        self._memory = memory
        self._rank = rank
        self._faults = faults
        self._has_faults = faults is not NO_FAULTS
        self._extra_s = 0.0
        self._arena = arena or PageArena(num_blocks, block_size)
        self._slots = ToySlots(num_slots)
        self._sequences: dict[int, ToySequence] = {}
        self._num_steps = 0
        self._is_asleep = False
        self._vocab_size, self._ids = toy_vocabulary(model_dir)

    def read(self, progress: LoadObserver) -> None:
        """There are no weights."""

    def sleep(self, model: str, drop_weights: bool) -> None:
        """Forget all sequences and slots."""
        self._sequences.clear()
        self._slots.clear()
        self._is_asleep = True

    def wake(self, model: str, progress: LoadObserver) -> None:
        """Nothing was lost."""
        self._is_asleep = False

    def join(self, board: RankBoard) -> None:
        """Each rank computes all of it: there is nobody to meet."""

    def load(self, progress: LoadObserver) -> WorkerReady:
        """Ready at once."""
        self._is_asleep = False
        self._sequences.clear()
        self._slots.clear()
        progress(1, 1)
        size, block = self._vocab_size, self._arena.block_size
        mark = f"xllm toy {self._model} {size} {self._ids} {block} {self._memory}"
        return WorkerReady(
            rank=self._rank,
            model=self._model,
            num_blocks=self._arena.num_blocks,
            block_size=block,
            max_model_len=fit_context(
                self._max_model_len or DEFAULT_MODEL_LEN, self._arena.num_blocks, block
            ),
            vocab_size=size,
            eos_ids=(),
            revision=hashlib.sha256(mark.encode()).hexdigest(),
            fingerprint="toy",
            kv_groups=(KvGroup("toy", ENTRY_BYTES + DIGEST_BYTES // block, num_layers=1),),
            device="toy",
            dtype="none",
            num_slots=self._slots.num_slots,
            max_mappings=available_mappings() if self._slots.num_slots else 0,
            task=self._task.task,
            pooling=self._task.pooling,
            embedding_size=WIDTH if self._task.pooling else 0,
        )

    def arrive(self, plan: StepPlan) -> None:
        """There is nothing to prepare."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one plan. EngineError where the model sleeps."""
        if self._is_asleep:
            raise EngineError(f"{self._model} sleeps and runs no plans")
        started = time.perf_counter_ns()
        broken_news = self._learn(plan.new)  # first: a fork's parent may end in the same plan
        for seq in plan.ended:
            self._sequences.pop(seq, None)
        for source, destination in plan.copies:
            self._arena.copy(source, destination)
        if plan.maps:
            self._slots.carry_out(plan.maps)
        scores = wanted_scores(plan.items, self._sequences, self._ids)
        vectors = VectorFrame()
        tokens: list[tuple[int, ...]] = []
        failed: list[tuple[int, str]] = []
        run_item = self._run_item
        for index, item in enumerate(plan.items):
            try:
                tokens.append(run_item(item))
            except (EngineError, InvariantError) as error:
                # Its history has a gap: items of it that are on their way must not run.
                self._sequences.pop(item.seq, None)
                failed.append((index, broken_news.get(item.seq, error).message))
                tokens.append(())
            except RuntimeError:
                for lost in plan.items:
                    self._sequences.pop(lost.seq, None)
                raise
            else:
                if scores is not None and item.kind <= _LAST_KIND:
                    scores.add_item(index, item, self._sequences[item.seq], tokens[-1])
                if self._task.pooling:
                    tail = self._arena.read_tail if self._memory else None
                    vectors.add_item(index, item, self._sequences.get(item.seq), tail)
        if self._token_s:
            self._extra_s += self._token_s * sum(item.num_tokens for item in plan.items)
        self._rest(started)
        self.counter += 1
        self._num_steps += 1
        result = StepResult(
            step=plan.step,
            tokens=tuple(tokens),
            duration_ns=time.perf_counter_ns() - started,
            logprob_rows=tuple(scores.rows) if scores is not None else (),
            num_top=scores.num_top if scores is not None else -1,
            failed=tuple(failed),
            pooled=tuple(vectors.items),
        )
        return StepOutput(
            result, (*(scores.frames() if scores is not None else ()), *vectors.frames())
        )

    def close(self) -> None:
        """Forget all sequences."""
        self._sequences.clear()

    @property
    def token_ids(self) -> range:
        """The ids that streams consist of: what `predict` needs."""
        return self._ids

    def statistics(self) -> ToyStatistics:
        """A snapshot; `pages.pages_broken` is 0 unless pages were mixed up."""
        return ToyStatistics(len(self._sequences), self._num_steps, self._arena.statistics())

    def check(self) -> None:
        """Raise InvariantError where a sequence lost its shape."""
        self._arena.check()
        for seq, sequence in self._sequences.items():
            if not 0 < sequence.prompt_len <= len(sequence.tokens):
                raise InvariantError(f"toy sequence {seq}: {len(sequence.tokens)} tokens")

    def _learn(self, news: tuple[NewSequence, ...]) -> dict[int, XllmError]:
        broken: dict[int, XllmError] = {}
        for new in news:
            try:
                self._sequences[new.seq] = ToySequence.learn(new, self._sequences)
            except EngineError as error:
                broken[new.seq] = error
        return broken

    def _run_item(self, item: StepItem) -> tuple[int, ...]:
        if item.kind > _LAST_KIND:
            if item.kind == ItemKind.DUMMY:
                return ()
            raise EngineError(f"sequence {item.seq}: items of kind {item.kind} are not supported")
        sequence = self._sequences.get(item.seq)
        if sequence is None:
            raise EngineError(f"sequence {item.seq} is not known here")
        if item.new_block_ids:
            sequence.table.extend(item.new_block_ids)
        start, end = item.start, item.start + item.num_tokens
        history = sequence.tokens
        if item.options is not None:
            check_options(item)
            if item.options.token_ids and item.kind != _VERIFY:
                history[start:end] = item.options.token_ids
        if item.kind == _VERIFY:
            return self._verify(sequence, item)
        if item.num_tokens < 1 or end > len(history):
            raise EngineError(
                f"sequence {item.seq} has {len(history)} tokens, not those of [{start}, {end})"
            )
        if self._has_faults:
            self._extra_s += self._faults.harm(history[start:end])
        if self._memory:
            self._write(sequence, start, history[start:end])
        if item.num_samples == 0:
            return ()
        if end != len(history):
            raise EngineError(f"sequence {item.seq} draws at {end}, before its end {len(history)}")
        if item.num_samples == 1:
            drawn = self._draw(sequence, sequence.choice, end)
            history.append(drawn)
            return (drawn,)
        many = tuple(self._draw(sequence, choice, end) for choice in range(item.num_samples))
        history.append(many[0])
        return many

    def _verify(self, sequence: ToySequence, item: StepItem) -> tuple[int, ...]:
        """The drafts are written like any tokens; the rows behind each of them draw."""
        history, start = sequence.tokens, item.start
        check_verify(item, len(history), history[-1], self._vocab_size)
        assert item.options is not None
        ids = item.options.token_ids
        if self._has_faults:
            self._extra_s += self._faults.harm(ids)
        if self._memory:
            self._write(sequence, start, ids)
        drawn = [
            self._draw(sequence, sequence.choice, start + 1 + number) for number in range(len(ids))
        ]
        accepted = tuple(drawn[: num_accepted(ids[1:], drawn)])
        history.extend(accepted)
        return accepted

    def _write(self, sequence: ToySequence, start: int, tokens: Sequence[int]) -> None:
        end = start + len(tokens)
        if sequence.slot >= 0:
            num_pages = -(-end // self._arena.block_size)
            self._slots.verify(sequence.slot, sequence.table[:num_pages])
        if not sequence.admitted:
            sequence.admitted = True
            if start and not self._arena.verify_prefix(sequence.table, start):
                sequence.broken = True
        if end - start == 1:
            self._arena.write_one(sequence.table, start, tokens[0])
        else:
            self._arena.write(sequence.table, start, tokens)

    def _draw(self, sequence: ToySequence, choice: int, position: int) -> int:
        if not self._memory:
            return draw_cheap(sequence.key(choice), position, self._ids)
        page = self._arena.read_tail(sequence.table, position)
        last = (position - 1) // self._arena.block_size
        if last and not self._arena.verify_page(sequence.table, position % last):
            sequence.broken = True
        return draw_token(page, sequence.seed, choice, position, self._ids, sequence.broken)

    def _rest(self, started_ns: int) -> None:
        step_s, self._extra_s = self._step_s + self._extra_s, 0.0
        if step_s <= 0:
            return
        end = started_ns * 1e-9 + step_s
        while (left := end - time.perf_counter_ns() * 1e-9) > 0:
            time.sleep(min(left, SLICE_S))
            self.counter += 1


def make_toy_models(settings: Settings, faults: ToyFaults = NO_FAULTS) -> Executor:
    """The toy engine of each model that the settings name, over the same pages."""
    models = each_model(settings)
    if len(models) == 1:
        return make_toy_executor(settings, faults)
    arena = PageArena(settings.worker.toy_num_blocks, settings.worker.host_block_size)
    return ModelHost([make_toy_executor(one, faults, arena) for one in models], models)


def make_toy_executor(
    settings: Settings, faults: ToyFaults = NO_FAULTS, arena: PageArena | None = None
) -> ToyExecutor:
    """The toy engine that the settings describe. `arena`: see ToyExecutor."""
    model, worker = settings.model, settings.worker
    return ToyExecutor(
        model=model.name or Path(model.path).name or "toy",
        model_dir=model.path,
        max_model_len=model.max_model_len,
        num_blocks=worker.toy_num_blocks,
        block_size=worker.host_block_size,
        step_s=worker.toy_step_ms / 1000,
        token_s=worker.toy_token_us / 1e6,
        memory=worker.toy_memory,
        rank=worker.rank,
        num_slots=2 * settings.scheduler.max_num_seqs if worker.kv_memory == "xtensor" else 0,
        faults=faults,
        task=resolve_task(model, Path(model.path)),
        arena=arena,
    )
