"""From a model that was read to an engine that steps: KV, slots, the loop, the drawer, and what the
worker tells the master of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import torch

from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.protocol.step import WorkerReady
from xllm.worker.collectives.ranks import Ranks
from xllm.worker.context import fit_context
from xllm.worker.execution.device.steps import DeviceSteps
from xllm.worker.execution.drawing import TokenDrawer
from xllm.worker.execution.layer_loop import LayerLoop
from xllm.worker.execution.loading import LoadedModel
from xllm.worker.execution.pooling import Pooler
from xllm.worker.execution.progress import ProgressCounter
from xllm.worker.execution.rank_head import Head, RankHead
from xllm.worker.execution.reading import ReadModel
from xllm.worker.execution.sequences import SequenceTable
from xllm.worker.graphs.footprint import NO_GRAPHS
from xllm.worker.kernels.fused import arg_max
from xllm.worker.layers.experts import ExpertTables
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.device_layout import DeviceLayout
from xllm.worker.memory.kv_memory import KvMemory
from xllm.worker.memory.layout import describe_groups
from xllm.worker.memory.making import (
    FoundBlock,
    find_block,
    make_memory,
    make_slots,
    max_mappings,
)
from xllm.worker.memory.mapper import PageMapper
from xllm.worker.memory.plan import MemoryPlan, log_plan
from xllm.worker.memory.sharing import SharedPages
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.models.model import WholeModel
from xllm.worker.platform.platform import Platform
from xllm.worker.sampling.greedy import best_tokens

_TORCH_KERNELS = "torch-sdpa-1"
_TRITON_KERNELS = "triton-1"
_WARM_UP_ROWS = (1, 32)


@dataclasses.dataclass(slots=True)
class LoadedEngine:
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
    device: DeviceSteps | None = None
    """Launches steps where the device computes behind the host's back."""
    plan: MemoryPlan | None = None
    """What an accelerator's memory goes to."""
    has_left_nan: bool = False
    """Whether a sequence of it did; see CpuKvMemory.may_hold_nan."""

    def note_nan(self, found: bool) -> None:
        """Whether a sequence just left numbers that are not finite."""
        if found:
            self.pool.may_hold_nan = self.has_left_nan = True

    def close(self) -> None:
        """Give graphs, slots and KV back; nothing of it may be used any more."""
        if self.device is not None:
            self.device.close()
        self.platform.synchronize()  # nothing may run over what is unmapped
        if self.mapper is not None:
            self.mapper.close()
        self.pool.close()


def make_engine(
    settings: Settings,
    read: ReadModel,
    progress: ProgressCounter,
    ranks: Ranks | None,
    pages: SharedPages | None,
    phase_ns: torch.Tensor | None,
    began: float,
) -> LoadedEngine:
    """The engine of a model that was read, warmed up. `pages`: of all models, where there are
    several. `phase_ns`: see LayerLoop. `began`: the monotonic time at which loading did. Raises
    ConfigError where its KV does not fit."""
    platform, loaded, model_len = read.platform, read.loaded, read.model_len
    model, dtype, team = loaded.model, loaded.dtype, loaded.team
    progress.follow(platform.mark)
    if team is not None:
        progress.add_counter(lambda: team.progress)
    num_models = 1 if pages is None else pages.num_models
    tick = progress.tick
    device, pool = _device_and_memory(settings, read, pages, tick)
    graphs = NO_GRAPHS if device is None else device.footprint
    layout = pool.layout
    model_len = fit_context(model_len, layout.num_blocks, layout.block_size)
    slots = make_slots(settings, pool, model_len, num_models)
    plan: MemoryPlan | None = None
    if not isinstance(pool, CpuKvMemory):
        plan = log_plan(settings, model.config, layout, loaded.num_bytes, platform, graphs)
    loop = LayerLoop(model, pool, dtype, platform.device, tick, team, phase_ns)
    for num_rows in _WARM_UP_ROWS:
        loop.warm_up(num_rows)
    if slots is None and device is not None:
        device.close()
        device = None
    is_launched = device is not None
    ready = _describe(settings, read, pool, model_len, slots, num_models, began, is_launched)
    drawer = TokenDrawer(
        model,
        platform.device,
        tick,
        alone=settings.worker.deterministic,
        head_invariant=loop.batch_invariant,
        head=_share(settings, loaded, loop, ranks),
        best=best_tokens if team is None else partial(arg_max, team),
    )
    return LoadedEngine(
        platform,
        pool,
        None if slots is None else PageMapper(slots),
        SequenceTable(layout.num_blocks, ready.vocab_size),
        loop,
        drawer,
        ready,
        loaded.num_bytes,
        model.experts,
        Pooler(model, tick) if loaded.task.pooling else None,
        device,
        plan,
    )


def _device_and_memory(
    settings: Settings, read: ReadModel, pages: SharedPages | None, tick: Callable[[], None]
) -> tuple[DeviceSteps | None, KvMemory]:
    """What launches steps, if anything does, and then KV: what graphs take of the device is
    measured, and the rest is for KV. Raises ConfigError where that is too little."""
    platform, config, dtype = read.platform, read.loaded.model.config, read.loaded.dtype
    block = find_block(settings, config, dtype, platform)
    device = _on_device(settings, read, block, read.model_len, tick)
    graphs = NO_GRAPHS if device is None else device.footprint
    try:
        pool = make_memory(settings, config, dtype, platform, read.model_len, pages, block, graphs)
    except ConfigError:
        if device is not None:
            device.close()
        raise
    return device, pool


def _on_device(
    settings: Settings,
    read: ReadModel,
    block: FoundBlock,
    model_len: int,
    tick: Callable[[], None],
) -> DeviceSteps | None:
    """What launches steps on an accelerator with kernels of our own; None: everything is torch's,
    or the bits of a row may not depend on its batch, or there is no virtual memory."""
    if read.platform.kernels != "triton" or settings.worker.deterministic:
        return None
    if not isinstance(block.one, DeviceLayout):
        return None
    if settings.master.num_workers > 1 or isinstance(read.loaded.model, WholeModel):
        return None
    # Only an accelerator has what it imports.
    from xllm.worker.execution.device.making import make_device_steps

    return make_device_steps(settings, read, block.one, model_len, tick)


def _share(
    settings: Settings, loaded: LoadedModel, loop: LayerLoop, ranks: Ranks | None
) -> Head | None:
    """Compute with the other ranks from now on, not before: nobody was there to warm up with.
    Gives the head that they have together."""
    if ranks is None:
        return None
    loop.share(ranks, settings.worker.micro_batch_rows)
    vocab_size = loaded.model.config.vocab_size
    return RankHead(loaded.model.head, ranks, loaded.head_rows, vocab_size)


def _describe(
    settings: Settings,
    read: ReadModel,
    pool: KvMemory,
    model_len: int,
    slots: SlotSpace | None,
    num_models: int,
    began: float,
    is_launched: bool,
) -> WorkerReady:
    platform, loaded, layout = read.platform, read.loaded, pool.layout
    model = loaded.model
    return WorkerReady(
        rank=settings.worker.rank,
        model=settings.model.name or read.directory.resolve().name,
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        max_model_len=model_len,
        vocab_size=model.config.vocab_size,
        # Ids beyond the vocabulary, which some configurations name, are never drawn.
        eos_ids=tuple(i for i in model.config.eos_ids if i < model.config.vocab_size),
        revision=loaded.revision,
        fingerprint=_fingerprint(settings, platform, loaded, is_launched),
        kv_groups=describe_groups(model.kv_groups, layout.item_bytes, layout.scale_bytes),
        device=platform.describe(),
        dtype=_type_name(settings, loaded.dtype),
        load_s=time.monotonic() - began,
        num_slots=0 if slots is None else slots.num_slots,
        max_mappings=0 if slots is None else max_mappings(slots, pool, num_models),
        task=loaded.task.task,
        pooling=loaded.task.pooling,
        embedding_size=model.config.hidden_size if loaded.task.pooling else 0,
        num_experts=0 if model.experts is None else model.experts.counts.shape[1],
    )


def _fingerprint(
    settings: Settings, platform: Platform, loaded: LoadedModel, is_launched: bool
) -> str:
    """What decides the bits of a result beside its inputs. `is_launched`: by device steps."""
    mode = "deterministic" if settings.worker.deterministic else "default"
    kernels = _TRITON_KERNELS if is_launched else _TORCH_KERNELS
    if loaded.team is not None:
        kernels = loaded.team.compiled.fingerprint()
    ranks = f"tp-{settings.master.num_workers}"
    parts = (*platform.fingerprint(), _type_name(settings, loaded.dtype), ranks, kernels, mode)
    return "/".join(parts)


def _type_name(settings: Settings, dtype: torch.dtype) -> str:
    """Of what is computed, and of what is rounded: bfloat16+int8+kv-int8."""
    quantization, kv = settings.model.quantization, settings.worker.kv_dtype
    name = str(dtype).removeprefix("torch.")
    name += "" if quantization == "none" else f"+{quantization}"
    return name if kv == "auto" else f"{name}+kv-{kv}"
