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
from functools import partial

import torch

from xllm.config.settings import Settings
from xllm.errors import EngineError
from xllm.protocol.step import StepPlan, WorkerReady
from xllm.worker.attention.plan import Span
from xllm.worker.collectives.making import make_ranks
from xllm.worker.context import fit_context
from xllm.worker.execution.batch import StepBatch, build_batch
from xllm.worker.execution.drawing import TokenDrawer
from xllm.worker.execution.layer_loop import LayerHook, LayerLoop
from xllm.worker.execution.loading import LoadedModel
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.execution.pooling import Pooler
from xllm.worker.execution.progress import ProgressCounter
from xllm.worker.execution.rank_head import Head, RankHead
from xllm.worker.execution.reading import ReadModel, read_model
from xllm.worker.execution.sequences import SequenceTable, SequenceTableStatistics
from xllm.worker.executor import Executor, HostedExecutor, StepOutput
from xllm.worker.kernels.fused import arg_max
from xllm.worker.layers.experts import ExpertTables
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.kv_memory import KvMemory
from xllm.worker.memory.layout import describe_groups
from xllm.worker.memory.making import (
    check_shareable,
    make_memory,
    make_slots,
    mappings_each,
    one_block,
)
from xllm.worker.memory.mapper import MapperStatistics, PageMapper
from xllm.worker.memory.pool import KvPoolStatistics
from xllm.worker.memory.sharing import SharedPages
from xllm.worker.platform.platform import Platform
from xllm.worker.rank_board import RankBoard
from xllm.worker.sampling.greedy import best_tokens

_TORCH_KERNELS = "torch-sdpa-1"
_WARM_UP_ROWS = (1, 32)


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


@dataclasses.dataclass(slots=True)
class _Engine:
    """All that exists once the model is loaded."""

    platform: Platform
    pool: KvMemory
    mapper: PageMapper | None
    table: SequenceTable
    loop: LayerLoop
    drawer: TokenDrawer
    ready: WorkerReady
    num_bytes: int
    experts: ExpertTables | None
    pooler: Pooler | None
    """Of a model that is served for vectors."""
    has_left_nan: bool = False
    """Whether a sequence of it did; see CpuKvMemory.may_hold_nan."""


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
        self._hooks: tuple[LayerHook, ...] = (self._progress, *hooks)
        self._engine: _Engine | None = None
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
        read = self._read = read_model(self._settings, progress)
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
        self._forget(engine)
        if isinstance(engine.pool, CpuKvMemory) and not engine.pool.is_shared:
            engine.pool.give_back()
        if drop_weights:
            if engine.mapper is not None:
                engine.mapper.close()
            self._engine = None
            self._progress.settle_elsewhere()
            del engine
            gc.collect()  # layers and tables know each other

    def wake(self, model: str, progress: Callable[[int, int], None]) -> None:
        """See Executor."""
        if self._engine is None:
            self._engine = self._load(progress)
        self._is_asleep = False

    def _forget(self, engine: _Engine) -> None:
        """Sequence numbers may begin anew: nothing of the old ones may be found."""
        engine.table = SequenceTable(engine.pool.layout.num_blocks, engine.ready.vocab_size)
        engine.pool.forget()
        if engine.mapper is not None:
            engine.mapper.forget()
        if engine.pooler is not None:
            engine.pooler.forget()

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one plan; see Executor. An item that cannot run is reported alone. A sequence that
        failed, alone or with its step, fails from then on: later plans may be on their way."""
        engine = self._loaded()
        began = time.perf_counter_ns()
        try:
            outputs = self._compute(engine, plan)
        except Exception:
            if self._ranks is not None:
                self._ranks.leave()  # the others may wait for this one in the middle of a layer
            for item in plan.items:
                engine.table.refuse(item.seq, "a step of it failed")
            raise
        finally:
            if engine.mapper is not None:
                engine.mapper.end_step()
        for index, reason in outputs.failed.items():
            engine.table.refuse(plan.items[index].seq, reason)
        self._num_steps += 1
        return outputs.pack(plan.step, time.perf_counter_ns() - began)

    def close(self) -> None:
        """Drop the model and its KV, leave the other ranks."""
        if self._ranks is not None:
            self._ranks.leave()
        if self._engine is not None and self._engine.mapper is not None:
            self._engine.mapper.close()
        self._engine = None

    def statistics(self) -> NativeStatistics:
        """Steps, sequences and memory."""
        engine = self._loaded()
        return NativeStatistics(
            self._num_steps,
            engine.num_bytes,
            engine.table.statistics(),
            engine.pool.statistics(),
            None if engine.mapper is None else engine.mapper.statistics(),
        )

    def check(self) -> None:
        """Raise InvariantError where the state cannot be."""
        engine = self._loaded()
        engine.table.check()
        engine.pool.check()
        if engine.mapper is not None:
            engine.mapper.check()

    def _compute(self, engine: _Engine, plan: StepPlan) -> StepOutputs:
        engine.table.begin(plan)
        if engine.pooler is not None:
            engine.pooler.begin(plan)
        size = engine.pool.layout.block_size
        if engine.mapper is not None:
            needs = engine.table.slot_needs(plan.items, size)
            engine.mapper.begin_step(plan.step, plan.maps, needs)
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
                self._run(engine, batch, outputs)
        if engine.experts is not None:
            outputs.expert_counts = engine.experts.take_counts()
        return outputs

    def _loaded(self) -> _Engine:
        if self._engine is None or self._is_asleep:
            raise EngineError("the model is not loaded, or sleeps")
        return self._engine

    def _load(self, progress: Callable[[int, int], None]) -> _Engine:
        began = time.monotonic()
        settings, worker = self._settings, self._settings.worker
        self.read(progress)
        read, self._read = self._read, None
        assert read is not None
        platform, loaded, model_len = read.platform, read.loaded, read.model_len
        model, dtype, team = loaded.model, loaded.dtype, loaded.team
        self._progress.follow(platform.mark)
        if team is not None:
            self._progress.add_counter(lambda: team.progress)
        num_models = 1 if self._pages is None else self._pages.num_models
        pool = make_memory(settings, model.config, dtype, platform, model_len, self._pages)
        layout, tick = pool.layout, self._progress.tick
        model_len = fit_context(model_len, layout.num_blocks, layout.block_size)
        slots = make_slots(settings, pool, model_len, num_models)
        loop = LayerLoop(model, pool, dtype, platform.device, tick, team, self._phase_ns)
        for num_rows in _WARM_UP_ROWS:
            loop.warm_up(num_rows)
        ready = WorkerReady(
            rank=worker.rank,
            model=settings.model.name or read.directory.resolve().name,
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            max_model_len=model_len,
            vocab_size=model.config.vocab_size,
            # Ids beyond the vocabulary, which some configurations name, are never drawn.
            eos_ids=tuple(i for i in model.config.eos_ids if i < model.config.vocab_size),
            revision=loaded.revision,
            fingerprint=self._fingerprint(platform, loaded),
            kv_groups=describe_groups(model.kv_groups, layout.item_bytes, layout.scale_bytes),
            device=platform.describe(),
            dtype=self._type_name(dtype),
            load_s=time.monotonic() - began,
            num_slots=0 if slots is None else slots.num_slots,
            max_mappings=0 if slots is None else mappings_each(num_models),
            task=loaded.task.task,
            pooling=loaded.task.pooling,
            embedding_size=model.config.hidden_size if loaded.task.pooling else 0,
        )
        return _Engine(
            platform,
            pool,
            None if slots is None else PageMapper(slots),
            SequenceTable(layout.num_blocks, ready.vocab_size),
            loop,
            self._make_drawer(loaded, platform, loop),
            ready,
            loaded.num_bytes,
            model.experts,
            Pooler(model, tick) if loaded.task.pooling else None,
        )

    def _make_drawer(self, loaded: LoadedModel, platform: Platform, loop: LayerLoop) -> TokenDrawer:
        return TokenDrawer(
            loaded.model,
            platform.device,
            self._progress.tick,
            alone=self._settings.worker.deterministic,
            head_invariant=loop.batch_invariant,
            head=self._share(loop, loaded),
            best=best_tokens if loaded.team is None else partial(arg_max, loaded.team),
        )

    def _share(self, loop: LayerLoop, loaded: LoadedModel) -> Head | None:
        """Compute with the other ranks from now on, not before: nobody was there to warm up with.
        Gives the head that they have together."""
        if self._ranks is None:
            return None
        loop.share(self._ranks, self._settings.worker.micro_batch_rows)
        vocab_size = loaded.model.config.vocab_size
        return RankHead(loaded.model.head, self._ranks, loaded.head_rows, vocab_size)

    def _fingerprint(self, platform: Platform, loaded: LoadedModel) -> str:
        """What decides the bits of a result beside its inputs."""
        mode = "deterministic" if self._settings.worker.deterministic else "default"
        kernels = _TORCH_KERNELS if loaded.team is None else loaded.team.compiled.fingerprint()
        ranks = f"tp-{self._settings.master.num_workers}"
        parts = (*platform.fingerprint(), self._type_name(loaded.dtype), ranks, kernels, mode)
        return "/".join(parts)

    def _type_name(self, dtype: torch.dtype) -> str:
        """Of what is computed, and of what is rounded: bfloat16+int8+kv-int8."""
        quantization, kv = self._settings.model.quantization, self._settings.worker.kv_dtype
        name = str(dtype).removeprefix("torch.")
        name += "" if quantization == "none" else f"+{quantization}"
        return name if kv == "auto" else f"{name}+kv-{kv}"

    def _run(self, engine: _Engine, batch: StepBatch, outputs: StepOutputs) -> None:
        pool = engine.pool
        if pool.may_hold_nan:
            # What another model left in a block is cleared once, when a sequence comes to it.
            entered = isinstance(pool, CpuKvMemory) and pool.is_shared and not engine.has_left_nan
            pool.clear_slots(_tails(batch.spans, pool.layout.block_size, entered=entered))
        num_failed = len(outputs.failed)
        loop = engine.loop
        if self._settings.worker.deterministic and not loop.batch_invariant:
            hidden = loop.run_single_rows(batch.single_rows(), batch.token_ids, self._hooks)
        else:
            hidden = loop.run(batch.spans, batch.token_ids, self._hooks)
        engine.drawer.draw(batch, hidden, outputs)
        if engine.pooler is not None:
            engine.pooler.pool(batch, hidden, outputs)
        engine.platform.synchronize()
        self._progress.settle()
        if len(outputs.failed) > num_failed:
            engine.pool.may_hold_nan = engine.has_left_nan = True


def _tails(spans: Sequence[Span], block_size: int, *, entered: bool) -> list[int]:
    """The slots behind each span's end in its last block: they are read, masked, and may hold
    what another sequence left. `entered`: only where the span begins its last block."""
    slots: list[int] = []
    for span in spans:
        block, offset = divmod(span.end, block_size)
        if offset and not (entered and span.start > block * block_size):
            first = span.block_ids[block] * block_size
            slots.extend(range(first + offset, first + block_size))
    return slots
