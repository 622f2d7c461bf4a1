"""A layer's experts by the compiled kernels against the machine's limits and torch, in one run.

    python -m benchmarks.experts [--shape 128x2048x768] [--rows 1,4,16,128] [--json FILE]

`--shape`: experts x hidden x inner (those of Qwen3-30B-A3B). For each row count, in
alternation: a probe of the memory's read bandwidth and of the multiply-adds' peak, then the
kernels over packed bfloat16 weights and the same layer in torch (its grouped product), in
bfloat16; both get the same new random rows each repetition. Prints medians: the experts chosen, the
time, GB/s of their weights, the time over the bound that the limits set in the same repetition,
torch's over the kernels'. Weights that a cache holds make the bound too high: give it a shape that
none does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.products import PROBE_BYTES, SETTLE_SECONDS
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.experts import ExpertSizes, PackedExperts
from xllm.worker.kernels.linear import Part
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.team import Team
from xllm.worker.layers.experts import ExpertTables, SparseMlp

DISTINCT = 4  # experts with numbers of their own: drawing them all would take minutes


@dataclasses.dataclass(frozen=True)
class Sample:
    """One repetition: seconds, experts, and what the limits allow."""

    kernels: float
    torch_bf16: float
    chosen: int
    num_bytes: int
    bound: float


class Contest:
    """A layer's experts in both forms."""

    def __init__(self, sizes: ExpertSizes, team: Team) -> None:
        self._sizes, self._team = sizes, team
        count, hidden, inner = sizes.num_experts, sizes.hidden, sizes.inner
        router = torch.randn(count, hidden).bfloat16()
        gate_up = torch.empty(count, 2 * inner, hidden, dtype=torch.bfloat16)
        down = torch.empty(count, hidden, inner, dtype=torch.bfloat16)
        few = min(DISTINCT, count)
        gate_up[:few] = torch.randn(few, 2 * inner, hidden) * hidden**-0.5
        down[:few] = torch.randn(few, hidden, inner) * inner**-0.5
        for slot in range(few, count):
            gate_up[slot], down[slot] = gate_up[slot % few], down[slot % few]
        self._tables = ExpertTables(1, count, torch.device("cpu"))
        self._torch = SparseMlp(
            0, router, gate_up, down, self._tables, sizes.top_k, sizes.normalise
        )
        slots, counts = self._tables.slots[0], self._tables.counts[0]
        self._packed = PackedExperts(Kind.BF16, Kind.BF16, sizes, slots, counts, team)
        self._packed.router.place(Part(router, 0))
        for slot in range(count):
            first = 2 * slot * self._packed.inner_blocks
            self._packed.gate_up.place(Part(gate_up[slot, :inner], first, 2))
            self._packed.gate_up.place(Part(gate_up[slot, inner:], first + 1, 2))
            self._packed.down.place(Part(down[slot], slot * self._packed.hidden_blocks))
        self._memory = torch.zeros(PROBE_BYTES, dtype=torch.uint8)

    def measure(self, rows: int, reps: int) -> list[Sample]:
        """So many repetitions behind one that warms up."""
        return [self._once(rows) for _ in range(reps + 1)][1:]

    def _once(self, rows: int) -> Sample:
        sizes = self._sizes
        x = torch.randn(rows, sizes.hidden)
        time.sleep(SETTLE_SECONDS)
        bandwidth = self._team.read_bandwidth(self._memory)
        peak = self._team.product_peak(seconds=0.0005)
        self._tables.take_counts()
        began = time.perf_counter()
        self._packed(x)
        between = time.perf_counter()
        chosen = int(self._tables.take_counts().count_nonzero())
        narrow = x.bfloat16()
        start = time.perf_counter()
        self._torch(narrow)
        end = time.perf_counter()
        each = 3 * sizes.hidden * sizes.inner
        router = sizes.num_experts * sizes.hidden
        num_bytes = 2 * (chosen * each + router)
        operations = 2 * rows * (sizes.top_k * each + router)
        bound = max(num_bytes / bandwidth, operations / peak)
        return Sample(between - began, end - start, chosen, num_bytes, bound)


def judge(rows: int, samples: Sequence[Sample]) -> dict[str, float]:
    """One line of the table: medians."""
    return {
        "rows": rows,
        "chosen": statistics.median(s.chosen for s in samples),
        "us": statistics.median(s.kernels for s in samples) * 1e6,
        "gb_s": statistics.median(s.num_bytes / s.kernels for s in samples) / 1e9,
        "over_bound": statistics.median(s.kernels / s.bound for s in samples),
        "torch_bf16": statistics.median(s.torch_bf16 / s.kernels for s in samples),
    }


def table(lines: Sequence[dict[str, float]]) -> str:
    """The lines as Markdown."""
    text = ["| rows | experts | µs | GB/s | over bound | torch bf16 |", "|---|---|---|---|---|---|"]
    form = (
        "| {rows} | {chosen:.0f} | {us:.0f} | {gb_s:.1f} | {over_bound:.2f} | {torch_bf16:.2f}x |"
    )
    return "\n".join([*text, *(form.format(**line) for line in lines)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="128x2048x768", help="experts x hidden x inner")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rows", default="1,4,16,128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    loaded = load()
    if loaded.compiled is None:
        parser.exit(1, f"no kernels: {loaded.reason}\n")
    count, hidden, inner = map(int, options.shape.split("x"))
    torch.set_num_threads(options.threads)
    team = Team(loaded.compiled, options.threads)
    row_counts = [int(rows) for rows in options.rows.split(",")]
    with torch.inference_mode():
        contest = Contest(ExpertSizes(count, count, options.top_k, True, hidden, inner), team)
        lines = [judge(rows, contest.measure(rows, options.reps)) for rows in row_counts]
    team.close()
    print(f"kernels: {loaded.compiled.describe()}; {options.threads} threads\n")
    print(table(lines))
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
