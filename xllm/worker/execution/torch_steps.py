"""Steps whose layers are run by the host: through the compiled kernels, or through torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm.worker.attention.plan import Span
from xllm.worker.execution.batch import StepBatch
from xllm.worker.execution.layer_loop import LayerHook
from xllm.worker.execution.loaded_engine import LoadedEngine
from xllm.worker.memory.cpu_memory import CpuKvMemory


def run_through_torch(
    engine: LoadedEngine, batch: StepBatch, hooks: Sequence[LayerHook], *, alone: bool
) -> torch.Tensor:
    """The last layer's output [rows, hidden] of a batch. `alone`: a row's bits may not depend on
    the rows beside it."""
    pool, loop = engine.pool, engine.loop
    if pool.may_hold_nan:
        # What another model left in a block is cleared once, when a sequence comes to it.
        entered = isinstance(pool, CpuKvMemory) and pool.is_shared and not engine.has_left_nan
        pool.clear_slots(_tails(batch.spans, pool.layout.block_size, entered=entered))
    if alone and not loop.batch_invariant:
        return loop.run_single_rows(batch.single_rows(), batch.token_ids, hooks)
    is_read_whole = engine.pooler is not None or bool(hooks)
    read = None if is_read_whole else batch.read_rows()
    return loop.run(batch.spans, batch.token_ids, hooks, read)


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
