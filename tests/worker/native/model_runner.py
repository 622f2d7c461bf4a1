"""A model over a pool of its own, run span by span: logits without sequences or plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from xllm.worker.attention.plan import Span
from xllm.worker.execution.layer_loop import LayerLoop
from xllm.worker.execution.loading import load_model
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.layout import KvLayout
from xllm.worker.memory.pool import KvPool, allocate_memory
from xllm.worker.platform.selection import select_platform

CPU = torch.device("cpu")
BLOCK_SIZE = 16


class Runner:
    """A loaded model over a pool of its own."""

    def __init__(
        self,
        directory: Path,
        implementation: str = "auto",
        *,
        dtype: str = "auto",
        kernels: str = "auto",
        num_threads: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.loaded = load_model(
            directory,
            dtype,
            select_platform("cpu"),
            lambda loaded, total: None,
            implementation,
            num_threads=num_threads,
            kernels=kernels,
            rank=rank,
            num_ranks=num_ranks,
            invariant=True,
        )
        self.head: Callable[[torch.Tensor], torch.Tensor] = self.loaded.model.head
        config, found = self.loaded.model.config, self.loaded.dtype
        kind = KvLayout if self.loaded.team is None else BlockLayout
        layout = kind(
            96,
            BLOCK_SIZE,
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            found.itemsize,
        )
        if isinstance(layout, BlockLayout):
            self.pool = CpuKvMemory(layout, found)
        else:
            self.pool = KvPool(layout, allocate_memory(layout, found, CPU))
        self.loop = LayerLoop(
            self.loaded.model, self.pool, found, CPU, lambda: None, self.loaded.team
        )

    def logits(self, spans: list[Span], token_ids: list[int], single: bool = False) -> torch.Tensor:
        run = self.loop.run_single_rows if single else self.loop.run
        with torch.inference_mode():
            return self.head(run(spans, token_ids, ()))
