"""The native executor: a model in torch, run plan by plan.

It ties the parts together and decides nothing itself: `SequenceTable` knows the sequences,
`build_batch` what can run, `LayerLoop` computes, `TokenDrawer` draws. One thread calls it; only
`counter` is read from others.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence

import torch

from xllm.config.settings import Settings
from xllm.errors import EngineError
from xllm.protocol.step import StepPlan, WorkerReady
from xllm.worker.collectives.making import make_ranks
from xllm.worker.execution.batch import StepBatch, build_batch
from xllm.worker.execution.device.steps import DeviceStatistics
from xllm.worker.execution.device.under_way import StepUnderWay, most_needed
from xllm.worker.execution.layer_loop import LayerHook
from xllm.worker.execution.loaded_engine import LoadedEngine, make_engine
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.execution.progress import ProgressCounter
from xllm.worker.execution.reading import ReadModel, read_model
from xllm.worker.execution.sequences import SequenceTable, SequenceTableStatistics
from xllm.worker.execution.torch_steps import run_through_torch
from xllm.worker.executor import DoneStep, Executor, HostedExecutor, LaunchedStep, StepOutput
from xllm.worker.memory.making import (
    check_shareable,
    one_block,
)
from xllm.worker.memory.mapper import MapperStatistics
from xllm.worker.memory.plan import MemoryPlan
from xllm.worker.memory.pool import KvPoolStatistics
from xllm.worker.memory.sharing import SharedPages
from xllm.worker.rank_board import RankBoard


def make_native_executor(settings: Settings, hooks: Sequence[LayerHook] = ()) -> Executor:
    """An executor of the model at `settings.model.path` (a local directory), not yet loaded.
    `hooks` are called around every layer of every step."""
    return NativeExecutor(settings, hooks)


def make_hosted_executor(settings: Settings, pages: SharedPages) -> HostedExecutor:
    """The same for one of several models, with KV in `pages`."""
    return NativeExecutor(settings, pages=pages)


@dataclasses.dataclass(frozen=True, slots=True)
class NativeStatistics:
    """A native executor at a glance."""

    num_steps: int
    weight_bytes: int
    """As they are kept: packed, without what stays in the files."""
    sequences: SequenceTableStatistics
    pool: KvPoolStatistics
    mapper: MapperStatistics | None = None
    """None: it reads by block tables."""
    device: DeviceStatistics | None = None
    """None: steps are not launched, they are run."""
    plan: MemoryPlan | None = None
    """Of an accelerator's memory."""


class NativeExecutor:
    """Implements Executor with the models of `xllm.worker.models`."""

    def __init__(
        self,
        settings: Settings,
        hooks: Sequence[LayerHook] = (),
        phase_ns: torch.Tensor | None = None,
        pages: SharedPages | None = None,
    ) -> None:
        """`phase_ns`: see LayerLoop. `pages`: of all models, where there are several."""
        self._phase_ns = phase_ns
        self._pages = pages
        self._read: ReadModel | None = None  # between `read` and `load`
        self._has_asked = False
        self._is_asleep = False
        self._settings = settings
        self._progress = ProgressCounter()
        self._hooks = tuple(hooks)
        self._engine: LoadedEngine | None = None
        self._num_steps = 0
        self._ranks = make_ranks(settings, self._progress.tick)

    @property
    def counter(self) -> int:
        """Pieces of work done so far: see ProgressCounter."""
        return self._progress.value

    def join(self, board: RankBoard) -> None:
        """Meet the other ranks, anew where they had met before. See Executor."""
        if self._ranks is None:
            raise EngineError("master.num_workers is 1: there are no other ranks")
        self._ranks.join(board)

    def read(self, progress: Callable[[int, int], None]) -> None:
        """Read the weights, unless they are here; see HostedExecutor."""
        if self._engine is not None or self._read is not None:
            return
        is_alone = self._pages is None
        read = self._read = read_model(self._settings, progress, is_alone=is_alone)
        if self._ranks is not None:
            self._ranks.place(read.platform)
        if self._pages is not None and not self._has_asked:
            check_shareable(read.platform)
            block = one_block(self._settings, read.loaded.model.config, read.loaded.dtype)
            self._pages.ask(block, self._settings.scheduler.max_num_seqs, read.model_len)
            self._has_asked = True

    def load(self, progress: Callable[[int, int], None]) -> WorkerReady:
        """Read the model, allocate its KV; again: forget the sequences. Raises ConfigError or
        DependencyError."""
        engine = self._engine
        if engine is None:
            engine = self._engine = self._load(progress)
        else:
            engine.pool.take_back()
            self._forget(engine)
            progress(engine.num_bytes, engine.num_bytes)
        self._is_asleep = False
        return engine.ready

    def arrive(self, plan: StepPlan) -> None:
        """Pages of new sequences are mapped while the step before theirs runs. See Executor."""
        engine = self._engine
        if engine is not None and engine.mapper is not None:
            engine.mapper.arrive(plan.step, plan.maps)

    def sleep(self, model: str, drop_weights: bool) -> None:
        """See Executor."""
        self._is_asleep = True
        engine = self._engine
        if engine is None:
            return
        engine.platform.synchronize()  # nothing may run over what is unmapped
        self._forget(engine)
        engine.pool.give_back()
        if drop_weights:
            engine.close()
            self._engine = None
            self._progress.settle_elsewhere()
            platform = engine.platform
            del engine
            gc.collect()  # layers and tables know each other
            platform.trim()

    def wake(self, model: str, progress: Callable[[int, int], None]) -> None:
        """See Executor."""
        if self._engine is None:
            self._engine = self._load(progress)
        self._engine.pool.take_back()
        self._is_asleep = False

    def _forget(self, engine: LoadedEngine) -> None:
        """Sequence numbers may begin anew: nothing of the old ones may be found."""
        if engine.device is not None:
            engine.note_nan(engine.device.wait(engine.table))
        engine.table = SequenceTable(engine.pool.layout.num_blocks, engine.ready.vocab_size)
        engine.pool.forget()
        if engine.mapper is not None:
            engine.mapper.forget()
        if engine.pooler is not None:
            engine.pooler.forget()

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one plan; see Executor. An item that cannot run is reported alone. A sequence that
        failed, alone or with its step, fails from then on: later plans may be on their way."""
        return self.launch(plan).wait()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """See LaunchingExecutor. On a CPU the plan was run when this returns."""
        engine = self._loaded()
        began = time.perf_counter_ns()
        try:
            outputs = self._compute(engine, plan)
        except Exception:
            if self._ranks is not None:
                self._ranks.leave()  # the others may wait for this one in the middle of a layer
            for item in plan.items:
                engine.table.refuse(item.seq, "a step of it failed")
            if engine.device is not None:
                engine.device.abandon()  # what was launched of it may read pages that go now
            raise
        self._num_steps += 1
        known = outputs.outputs if isinstance(outputs, StepUnderWay) else outputs
        for index, reason in known.failed.items():
            engine.table.refuse(plan.items[index].seq, reason)
        if isinstance(outputs, StepUnderWay):
            return outputs
        return DoneStep(outputs.pack(plan.step, time.perf_counter_ns() - began))

    def close(self) -> None:
        """Drop the model and its KV, leave the other ranks."""
        if self._ranks is not None:
            self._ranks.leave()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def statistics(self) -> NativeStatistics:
        """Steps, sequences and memory."""
        engine = self._loaded()
        return NativeStatistics(
            self._num_steps,
            engine.num_bytes,
            engine.table.statistics(),
            engine.pool.statistics(),
            None if engine.mapper is None else engine.mapper.statistics(),
            None if engine.device is None else engine.device.statistics(),
            engine.plan,
        )

    def check(self) -> None:
        """Raise InvariantError where the state cannot be."""
        engine = self._loaded()
        engine.table.check()
        engine.pool.check()
        if engine.mapper is not None:
            engine.mapper.check()

    def _compute(self, engine: LoadedEngine, plan: StepPlan) -> StepOutputs | StepUnderWay:
        size = engine.pool.layout.block_size
        if engine.device is not None:
            engine.note_nan(engine.device.make_room(engine.table, plan.maps, size))
        engine.table.begin(plan)
        if engine.pooler is not None:
            engine.pooler.begin(plan)
        if engine.mapper is not None:
            needs = engine.table.slot_needs(plan.items, size)
            if engine.device is not None:
                # What steps under way touch is not let go for the plan behind this one either.
                needs = most_needed(needs, engine.device.under_way.needs(size))
            engine.mapper.begin_step(plan.step, plan.maps, needs)
        try:
            return self._begin(engine, plan, size)
        finally:
            if engine.mapper is not None and engine.device is None:
                engine.mapper.end_step()

    def _begin(self, engine: LoadedEngine, plan: StepPlan, size: int) -> StepOutputs | StepUnderWay:
        engine.pool.copy_blocks(plan.copies)
        batch = build_batch(
            plan.items, engine.table, size, engine.ready.max_model_len, engine.mapper
        )
        outputs = StepOutputs(len(plan.items), batch.failed)
        if self._ranks is not None and plan.items:
            self._ranks.agree((plan.step, len(batch.token_ids), len(batch.failed)))
        if engine.experts is not None:
            engine.experts.take_counts()  # of a warm-up, or of a step that broke off
        if batch.entries:
            with torch.inference_mode():
                under_way = self._run(engine, plan.step, batch, outputs)
            if under_way is not None:
                return under_way
        elif engine.device is not None:
            engine.note_nan(engine.device.wait(engine.table))  # answered behind those before it
        if engine.experts is not None:
            outputs.expert_counts = engine.experts.take_counts()
        return outputs

    def _loaded(self) -> LoadedEngine:
        if self._engine is None or self._is_asleep:
            raise EngineError("the model is not loaded, or sleeps")
        return self._engine

    def _load(self, progress: Callable[[int, int], None]) -> LoadedEngine:
        began = time.monotonic()
        self.read(progress)
        read, self._read = self._read, None
        assert read is not None
        return make_engine(
            self._settings,
            read,
            self._progress,
            self._ranks,
            self._pages,
            self._phase_ns,
            began,
        )

    def _run(
        self, engine: LoadedEngine, step: int, batch: StepBatch, outputs: StepOutputs
    ) -> StepUnderWay | None:
        """Compute a batch; None where its outputs are there."""
        num_failed = len(outputs.failed)
        device = engine.device
        if device is not None and not self._hooks and device.can_run(batch):
            is_plain = engine.pooler is None and engine.experts is None
            if is_plain and device.can_draw(batch):
                return device.launch(step, batch, outputs)
            batch, hidden = device.hidden(batch)
            engine.note_nan(device.wait(engine.table))
        else:
            if device is not None:
                engine.note_nan(device.wait(engine.table))
                batch.refresh_tokens()
            hidden = run_through_torch(
                engine, batch, self._hooks, alone=self._settings.worker.deterministic
            )
        if device is not None:
            for index, reason in batch.drop_refused(engine.table):
                outputs.fail(index, reason)
        engine.drawer.draw(batch, hidden, outputs)
        if engine.pooler is not None:
            engine.pooler.pool(batch, hidden, outputs)
        engine.platform.synchronize()
        self._progress.settle()
        engine.note_nan(outputs.left_nan or len(outputs.failed) > num_failed)
        return None
