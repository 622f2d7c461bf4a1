"""The kernels of a decoder layer on a GPU against the GPU's own limits, all in one run.

    python -m benchmarks.device_kernels [--shapes qwen3-8b,...] [--batches 1,64,256]
        [--context 2048] [--prompt 2048] [--reps 30] [--memory-gib 16] [--json FILE]

First the limits: the bandwidth of a copy of 1 GiB and the rate of a bfloat16 product of 8192 x 8192
matrices. Then, for each shape: decode and prefill attention over slots (xTensor), over block
tables of the same memory and over block tables of 16-token blocks; norms, rotation and the writing
of keys and values; gates. A repetition is a captured graph of one call for each layer, every layer
with memory of its own, as many layers as the budget holds: what one call leaves in the cache
is no other's. CUDA events around a repetition; medians; the time of a call is a repetition's over
its calls. Also says how long mapping a block into a slot took, on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_costs import (
    SHAPES,
    Cost,
    DeviceShape,
    Limits,
    against_tables,
    attention_cost,
    gate_cost,
    line,
    norm_cost,
    table,
    write_cost,
)
from xllm.worker.memory.device_layout import DeviceLayout, choose_block_size
from xllm.worker.memory.device_memory import DeviceKvMemory
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.platform.cuda_driver import CudaDriver
from xllm.worker.platform.device_driver import DeviceDriver
from xllm.worker.triton_kernels.activation import silu_mul
from xllm.worker.triton_kernels.decode_attention import decode_attention, decode_cut
from xllm.worker.triton_kernels.norm import add_rms_norm
from xllm.worker.triton_kernels.prefill_attention import prefill_attention
from xllm.worker.triton_kernels.rope_write import rope_write
from xllm.worker.triton_kernels.strides import KvStrides, strides_of
from xllm.worker.triton_kernels.tiling import row_tiles, tile_tokens

SMALL_BLOCK = 16
_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where kernels run: a device, its driver, and `clock(run, reps)`, the median of seconds that
    `run` takes there."""

    device: torch.device
    driver: DeviceDriver
    clock: Callable[[Callable[[], None], int], float]
    dtype: torch.dtype = torch.bfloat16

    def empty(self, *shape: int) -> torch.Tensor:
        """Random numbers of the stage's type."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def ints(self, values: Sequence[Any], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Whole numbers on the device."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured; see the module."""

    shapes: tuple[DeviceShape, ...]
    batches: tuple[int, ...] = (1, 64, 256)
    context: int = 2048
    prompt: int = 2048
    reps: int = 30
    budget_bytes: int = 16 << 30


class SequenceMemory:
    """`num_seqs` sequences of `length` tokens in blocks that lie in any order: under slots, by
    tables of the same blocks, and by tables of 16-token blocks elsewhere."""

    def __init__(self, stage: Stage, shape: DeviceShape, num_seqs: int, length: int, layers: int):
        item = stage.dtype.itemsize
        heads, dim = shape.num_kv_heads, shape.head_dim
        granularity = stage.driver.granularity
        size = choose_block_size(shape.token_bytes * shape.num_layers, granularity)
        width = -(-length // size)
        layout = DeviceLayout(num_seqs * width, size, layers, heads, dim, item, granularity)
        self.strides = strides_of(layout, stage.dtype)
        self._memory = DeviceKvMemory(layout, stage.dtype, stage.driver)
        for layer in range(layers):
            self._memory.keys(layer).normal_()
            self._memory.values(layer).normal_()
        self._slots = SlotSpace(
            self._memory.slot_memory(),
            num_slots=num_seqs,
            pages_per_slot=width,
            page_bytes=layout.block_bytes,
            num_pages=layout.num_blocks,
        )
        blocks = random.Random(1).sample(range(layout.num_blocks), layout.num_blocks)
        rows = [blocks[i * width : (i + 1) * width] for i in range(num_seqs)]
        for slot, pages in enumerate(rows):
            self._slots.map(slot, 0, pages)
        slots = [self._slots.address(slot) for slot in range(num_seqs)]
        pool, block_bytes = self._memory.pool_address, layout.block_bytes
        tables = [[pool + block * block_bytes for block in row] for row in rows]
        self.slots = stage.ints(slots, torch.int64)
        self.tables = stage.ints(tables, torch.int64)
        statistics_ = self._slots.statistics()
        self.map_us = statistics_.map_ns / 1e3 / statistics_.num_pages_mapped

        narrow = -(-length // SMALL_BLOCK)
        small = DeviceLayout(num_seqs * narrow, SMALL_BLOCK, layers, heads, dim, item, 256)
        self.small_strides = strides_of(small, stage.dtype)
        self._small = stage.empty(small.num_blocks, small.block_numbers)
        blocks = random.Random(2).sample(range(small.num_blocks), small.num_blocks)
        start = self._small.data_ptr()
        self.small_tables = stage.ints(
            [start + block * small.block_bytes for block in blocks], torch.int64
        ).view(num_seqs, narrow)

    def arms(self, kernel: str) -> list[tuple[str, torch.Tensor, KvStrides]]:
        """(name, addresses, strides) of each way to the keys."""
        return [
            (kernel, self.slots, self.strides),
            (f"{kernel}, tables", self.tables, self.strides),
            (f"{kernel}, tables of 16", self.small_tables, self.small_strides),
        ]

    def close(self) -> None:
        """Give the memory back."""
        self._slots.close()
        self._memory.close()


def measure_decode(
    stage: Stage, shape: DeviceShape, limits: Limits, arguments: Arguments, num_seqs: int
) -> list[dict[str, Any]]:
    """One token each of `num_seqs` sequences, by each way to the keys."""
    length = arguments.context
    layers = shape.layers_within(num_seqs * length, arguments.budget_bytes // 2)
    memory = SequenceMemory(stage, shape, num_seqs, length, layers)
    q = stage.empty(num_seqs, 1, shape.num_heads, shape.head_dim)
    out = torch.empty_like(q)
    lengths = stage.ints([length] * num_seqs)
    cut = decode_cut(q, memory.strides, max_length=length)
    numbers = cut.scratch_numbers(num_seqs * shape.num_heads, shape.head_dim)
    scratch = torch.empty(numbers, device=stage.device)

    def runner(addresses: torch.Tensor, strides: KvStrides) -> Callable[[], None]:
        def run() -> None:
            for layer in range(layers):
                decode_attention(
                    q, out, addresses, lengths, layer, strides,
                    scale=shape.head_dim**-0.5, max_length=length, scratch=scratch,
                )  # fmt: skip

        return run

    cost = attention_cost(shape, num_seqs, 1, length)
    case = f"{num_seqs} x 1 of {length}"
    runs = [(name, runner(a, s)) for name, a, s in memory.arms("decode")]
    return _measured(stage, shape, limits, arguments, runs, case, cost, out, memory, layers)


def measure_prefill(
    stage: Stage, shape: DeviceShape, limits: Limits, arguments: Arguments, rows: int
) -> list[dict[str, Any]]:
    """The last `rows` tokens of one prompt, by each way to the keys."""
    length = arguments.prompt
    layers = shape.layers_within(length, arguments.budget_bytes // 2)
    memory = SequenceMemory(stage, shape, 1, length, layers)
    q = stage.empty(rows, shape.num_heads, shape.head_dim)
    out = torch.empty_like(q)
    tiles = row_tiles([rows], [length], tile_tokens(memory.strides, shape.num_heads))
    starts, tiles_, lengths = stage.ints([0, rows]), stage.ints(tiles), stage.ints([length])

    def runner(addresses: torch.Tensor, strides: KvStrides) -> Callable[[], None]:
        def run() -> None:
            for layer in range(layers):
                prefill_attention(
                    q, out, starts, tiles_, addresses, lengths, layer, strides,
                    scale=shape.head_dim**-0.5,
                )  # fmt: skip

        return run

    cost = attention_cost(shape, 1, rows, length)
    case = f"1 x {rows} of {length}"
    runs = [(name, runner(a, s)) for name, a, s in memory.arms("prefill")]
    return _measured(stage, shape, limits, arguments, runs, case, cost, out, memory, layers)


def _measured(
    stage: Stage,
    shape: DeviceShape,
    limits: Limits,
    arguments: Arguments,
    runs: Sequence[tuple[str, Callable[[], None]]],
    case: str,
    cost: Cost,
    out: torch.Tensor,
    memory: SequenceMemory,
    calls: int,
) -> list[dict[str, Any]]:
    """A line an arm. The first two read the same memory: RuntimeError where they differ."""
    found, results = [], []
    for name, run in runs:
        run()
        results.append(out.clone())
        seconds = stage.clock(run, arguments.reps) / calls
        found.append(line(shape, name, case, cost, seconds, limits) | {"map_us": memory.map_us})
    memory.close()
    if not torch.allclose(results[0].float(), results[1].float(), atol=1e-2, rtol=1e-2):
        raise RuntimeError(f"{shape.name}, {case}: slots and tables give different attention")
    return found


def measure_rows(
    stage: Stage, shape: DeviceShape, limits: Limits, arguments: Arguments, rows: int
) -> list[dict[str, Any]]:
    """What is fused around attention, for `rows` rows, each a sequence with a block of its own."""
    memory = SequenceMemory(stage, shape, rows, 1, 1)
    heads, dim = shape.num_heads, shape.head_dim
    qkv = stage.empty(rows, (heads + 2 * shape.num_kv_heads) * dim)
    q, weight = stage.empty(rows, heads, dim), stage.empty(dim)
    angles = torch.rand(2, rows, dim // 2, device=stage.device)
    positions = stage.ints([0] * rows)
    x, residual = stage.empty(rows, shape.hidden), stage.empty(rows, shape.hidden)
    norm_weight, gate_up = stage.empty(shape.hidden), stage.empty(rows, 2 * shape.inner)

    def write() -> None:
        rope_write(
            qkv, q, angles[0], angles[1], memory.slots, positions, 0, memory.strides,
            query_weight=weight, key_weight=weight, eps=_EPS,
        )  # fmt: skip

    def norm() -> None:
        add_rms_norm(x, residual, norm_weight, _EPS)

    def gate() -> None:
        silu_mul(gate_up)

    found = []
    kernels: list[tuple[str, Callable[[], None], Cost]] = [
        ("rope and write", write, write_cost(shape, rows)),
        ("add and norm", norm, norm_cost(shape, rows)),
        ("silu and mul", gate, gate_cost(shape, rows)),
    ]
    for name, run, cost in kernels:

        def repeated(run: Callable[[], None] = run) -> None:
            for _ in range(shape.num_layers):
                run()

        seconds = stage.clock(repeated, arguments.reps) / shape.num_layers
        found.append(line(shape, name, f"{rows} rows, cached", cost, seconds, limits))
    memory.close()
    return found


def measure(stage: Stage, limits: Limits, arguments: Arguments) -> list[dict[str, Any]]:
    """All lines of the table."""
    found = []
    for shape in arguments.shapes:
        for num_seqs in arguments.batches:
            found += measure_decode(stage, shape, limits, arguments, num_seqs)
        for rows in (arguments.prompt, -(-arguments.prompt // 4)):
            found += measure_prefill(stage, shape, limits, arguments, rows)
        for rows in arguments.batches:
            found += measure_rows(stage, shape, limits, arguments, rows)
    return found


def measure_limits(stage: Stage, reps: int, copied: int = 1 << 30, size: int = 8192) -> Limits:
    """The device's limits, of a copy of so many bytes and a product of matrices of that size."""
    source = torch.zeros(copied, dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    a, b = stage.empty(size, size), stage.empty(size, size)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    def copy() -> None:
        target.copy_(source)

    copying, multiplying = stage.clock(copy, reps), stage.clock(multiply, reps)
    return Limits(2 * copied / copying, 2 * size**3 / multiplying)


def gpu_clock(run: Callable[[], None], reps: int) -> float:
    """The median of seconds that a captured graph of `run` takes, by CUDA events."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for rep in range(reps + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if rep >= 2:  # the clocks of the GPU rise
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def report(limits: Limits, lines: Sequence[dict[str, Any]], device: str) -> str:
    """The run in Markdown."""
    head = f"{device}: copies {limits.bandwidth / 1e9:.0f} GB/s, products "
    head += f"{limits.rate / 1e12:.0f} TFLOP/s"
    times = [x["map_us"] for x in lines if "map_us" in x]
    mapping = f"mapping a block into a slot: {statistics.median(times):.1f} us"
    return "\n\n".join((head, table(lines), against_tables(lines), mapping))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--reps", type=int, default=30)
    parser.add_argument("--memory-gib", type=int, default=16)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.device_kernels needs an NVIDIA GPU, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    stage = Stage(device, CudaDriver(device), gpu_clock)
    wanted = Arguments(
        tuple(SHAPES[name] for name in asked.shapes.split(",")),
        tuple(int(number) for number in asked.batches.split(",")),
        asked.context,
        asked.prompt,
        asked.reps,
        asked.memory_gib << 30,
    )
    limits = measure_limits(stage, asked.reps)
    lines = measure(stage, limits, wanted)
    name = torch.cuda.get_device_name(device)
    print(report(limits, lines, name))
    if asked.json:
        found = {"device": name, "limits": dataclasses.asdict(limits), "lines": lines}
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
