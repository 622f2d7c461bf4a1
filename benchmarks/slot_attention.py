"""The attention kernel alone, over slots and over block tables, for one model's heads.

Where the sequences of a case share a prefix a third arm reads it anew for each of them.

The same keys and values, in blocks that lie anywhere in the memory, once as the table of each
sequence names them and once mapped side by side under a slot. Both run in turns, layer by layer as
in a step, so that what one layer reads is not what the last one left in the processor's caches.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xllm.worker.attention.plan import Span
from xllm.worker.kernels.attention import KernelAttention
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.team import Team
from xllm.worker.loader.config import ModelConfig, read_config
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.memory.virtual import CpuVirtualMemory
from xllm.worker.models.registry import find_family

_BLOCK_SIZE = 16
_PASSES = 9


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Sequences with `context` tokens each, the first `shared` of which they have in common, that
    compute `rows` more."""

    name: str
    sequences: int
    context: int
    rows: int
    shared: int = 0


CASES = (
    Case("decode", 1, 2048, 1),
    Case("decode", 16, 128, 1),
    Case("decode", 16, 1024, 1),
    Case("decode", 24, 800, 1, 768),
    Case("decode", 4, 800, 1, 768),
    Case("prefill", 1, 0, 512),
    Case("prefill", 1, 1024, 256),
)


class KernelBench:
    """Memory with the case's sequences in it, and both ways to reach them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, team: Team, case: Case) -> None:
        self._config = config
        self._team = team
        tokens = case.context + case.rows
        width = -(-tokens // _BLOCK_SIZE)
        layout = BlockLayout(
            width * case.sequences,
            _BLOCK_SIZE,
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            dtype.itemsize,
        )
        self._memory = CpuKvMemory(layout, dtype)
        self._memory.pool_tensor(dtype).normal_()
        self._slots = SlotSpace(
            CpuVirtualMemory(self._memory.fd),
            num_slots=case.sequences,
            pages_per_slot=width,
            page_bytes=layout.block_bytes,
            num_pages=layout.num_blocks,
        )
        blocks = list(range(layout.num_blocks))
        random.Random(1).shuffle(blocks)
        self.spans: dict[str, list[Span]] = {"paged": [], "xtensor": []}
        for index in range(case.sequences):
            table = array("q", blocks[index * width : (index + 1) * width])
            table[: case.shared // _BLOCK_SIZE] = array("q", blocks[: case.shared // _BLOCK_SIZE])
            self._slots.map(index, 0, table)
            address = self._slots.address(index)
            self.spans["paged"].append(Span(case.context, case.rows, table))
            self.spans["xtensor"].append(Span(case.context, case.rows, table, address))
        if case.shared:
            self.spans["apart"] = self.spans["xtensor"]
        rows = case.sequences * case.rows
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._inputs = [torch.randn(rows, count, dim) for count in (heads, kv_heads, kv_heads)]

    def run(self, arm: str) -> float:
        """Milliseconds of all layers' attention, writing of keys and values included."""
        config = self._config
        windows = config.layer_windows
        attention = KernelAttention(
            self._team,
            self._memory,
            self.spans[arm],
            windows,
            lambda: None,
            share=arm != "apart",
        )
        began = time.perf_counter()
        for layer in range(config.num_layers):
            attention.attend(layer, *self._inputs)
        return 1e3 * (time.perf_counter() - began)

    def close(self) -> None:
        """Give the slots up."""
        self._slots.close()


def attention_report(
    path: str, dtype: str, num_threads: int, cases: Sequence[Case]
) -> list[dict[str, Any]]:
    """Milliseconds by case and arm, medians; empty where the kernels were not built."""
    library = load().compiled
    if library is None:
        return []
    raw = read_config(Path(path))
    config = find_family(raw.architecture()).read(raw)
    team = Team(library, num_threads)
    found = []
    for case in cases:
        bench = KernelBench(config, getattr(torch, dtype), team, case)
        times: dict[str, list[float]] = {arm: [] for arm in bench.spans}
        for number in range(_PASSES + 1):
            order = list(times) if number % 2 else list(reversed(times))
            for arm in order:
                took = bench.run(arm)
                if number:
                    times[arm].append(took)
        bench.close()
        pairs = zip(times["xtensor"], times["paged"], strict=True)
        ratio = statistics.median(slot / table for slot, table in pairs)
        medians = {f"{arm}_ms": statistics.median(all_) for arm, all_ in times.items()}
        found.append(dataclasses.asdict(case) | medians | {"ratio": ratio})
    return found


def print_attention(rows: list[dict[str, Any]]) -> None:
    """A line a case."""
    columns = f"{'block tables':>14}{'xTensor':>12}{'ratio':>8}{'not shared':>14}"
    print(f"\n{'attention of all layers, ms':<46}{columns}")
    for row in rows:
        title = f"{row['name']}, {row['sequences']} x {row['rows']} after {row['context']}"
        title += f" ({row['shared']} shared)" if row["shared"] else ""
        apart = f"{row['apart_ms']:>14.3f}" if row["shared"] else ""
        times = f"{row['paged_ms']:>14.3f}{row['xtensor_ms']:>12.3f}{row['ratio']:>8.3f}"
        print(f"{title:<46}{times}{apart}")
