"""The products of the compiled kernels against the machine's limits and torch, all in one run.

    python -m benchmarks.products [--shapes qkv=4096x1024,...] [--rows 1,4,16,512] [--json FILE]

For each shape (outputs x inputs) and row count, in alternation: a probe of the memory's read
bandwidth and of the multiply-adds' peak, then the kernels over packed weights, torch's F.linear
in bfloat16 and in float32, each over enough copies of its weights that no cache holds them. Prints
medians: the time of a product, GB/s of weights and GFLOP/s reached, the time over the bound that
the two limits set in the same repetition, and torch's times over the kernels'. --best takes the
best of each instead, for a machine that others use: give it many repetitions, and --threads 1,
whose times are those of the thread on its CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.linear import Epilogue, pack_linear
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.team import Team

QWEN3_SHAPES = "qkv=4096x1024,out=1024x2048,gate_up=6144x1024,down=1024x3072,head=151936x1024"
KINDS = {"bf16": Kind.BF16, "fp32": Kind.FP32}
PROBE_BYTES, PROBE_PIECE = 64 << 20, 8 << 20
SETTLE_SECONDS = 0.02  # torch's threads spin for a while behind their work, on our cores


@dataclasses.dataclass(frozen=True)
class Shape:
    """A weight matrix."""

    name: str
    outputs: int
    inputs: int


@dataclasses.dataclass
class Samples:
    """What the repetitions of one shape and row count gave: seconds a product, and the limits."""

    kernels: list[float] = dataclasses.field(default_factory=list)
    torch_bf16: list[float] = dataclasses.field(default_factory=list)
    torch_fp32: list[float] = dataclasses.field(default_factory=list)
    bandwidth: list[float] = dataclasses.field(default_factory=list)
    peak: list[float] = dataclasses.field(default_factory=list)

    def best(self) -> Samples:
        """The least times and the highest limits, whichever repetition had them."""
        return Samples(
            [min(self.kernels)],
            [min(self.torch_bf16)],
            [min(self.torch_fp32)],
            [max(self.bandwidth)],
            [max(self.peak)],
        )


def parse_shapes(text: str) -> list[Shape]:
    """`name=outputsxinputs`, separated by commas."""
    shapes = []
    for item in text.split(","):
        name, _, size = item.partition("=")
        outputs, _, inputs = size.partition("x")
        shapes.append(Shape(name, int(outputs), int(inputs)))
    return shapes


class Contest:
    """The weights of one shape, in each form, and the probe's memory."""

    def __init__(self, shape: Shape, kind: Kind, team: Team, cold_bytes: int) -> None:
        """cold_bytes: that the copies of the packed weights hold together, at least."""
        self._shape, self._team = shape, team
        self._itemsize = 2 if kind == Kind.BF16 else 4
        self.weight_bytes = shape.outputs * shape.inputs * self._itemsize
        copies = max(1, -(-cold_bytes // self.weight_bytes))
        weight = torch.randn(shape.outputs, shape.inputs).bfloat16()
        self._packed = [pack_linear(kind, weight, None, team) for _ in range(copies)]
        self._bf16 = [weight.clone() for _ in range(copies)]
        self._fp32 = [weight.float() for _ in range(max(1, copies // 2))]
        self._memory = torch.zeros(PROBE_BYTES, dtype=torch.uint8)

    def measure(self, rows: int, reps: int, calls: int) -> Samples:
        """`calls` products a repetition, over one copy of the weights after the other."""
        x = torch.randn(rows, self._shape.inputs)
        narrow, out = x.bfloat16(), torch.empty(rows, self._shape.outputs)
        runs: list[Callable[[int], object]] = [
            lambda i: self._packed[i % len(self._packed)](x, Epilogue.STORE, out),
            lambda i: F.linear(narrow, self._bf16[i % len(self._bf16)]),
            lambda i: F.linear(x, self._fp32[i % len(self._fp32)]),
        ]
        found = Samples()
        kept = (found.kernels, found.torch_bf16, found.torch_fp32)
        for rep in range(reps + 1):  # the first warms up
            time.sleep(SETTLE_SECONDS)
            piece = rep * PROBE_PIECE % PROBE_BYTES
            bandwidth = self._team.read_bandwidth(self._memory[piece : piece + PROBE_PIECE])
            peak = self._team.product_peak(seconds=0.0005)
            clock = time.perf_counter if self._team.num_threads > 1 else time.thread_time
            seconds = [_seconds(clock, run, rep * calls, calls) for run in runs]
            if rep == 0:
                continue
            found.bandwidth.append(bandwidth)
            found.peak.append(peak)
            for samples, value in zip(kept, seconds, strict=True):
                samples.append(value)
        return found

    def judge(self, rows: int, samples: Samples, best: bool) -> dict[str, object]:
        """One line of the table, of medians or of the best of each."""
        if best:
            samples = samples.best()
        operations = 2 * self._shape.outputs * self._shape.inputs * rows
        bounds = [
            max(self.weight_bytes / bandwidth, operations / peak)
            for bandwidth, peak in zip(samples.bandwidth, samples.peak, strict=True)
        ]
        seconds = statistics.median(samples.kernels)
        return {
            "shape": self._shape.name,
            "outputs": self._shape.outputs,
            "inputs": self._shape.inputs,
            "rows": rows,
            "us": seconds * 1e6,
            "gb_s": self.weight_bytes / seconds / 1e9,
            "gflop_s": operations / seconds / 1e9,
            "bandwidth_gb_s": statistics.median(samples.bandwidth) / 1e9,
            "peak_gflop_s": statistics.median(samples.peak) / 1e9,
            "over_bound": _median_ratio(samples.kernels, bounds),
            "torch_bf16": _median_ratio(samples.torch_bf16, samples.kernels),
            "torch_fp32": _median_ratio(samples.torch_fp32, samples.kernels),
        }


def _seconds(
    clock: Callable[[], float], run: Callable[[int], object], first: int, calls: int
) -> float:
    began = clock()
    for i in range(first, first + calls):
        run(i)
    return (clock() - began) / calls


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(lines: list[dict[str, object]]) -> str:
    """The lines as Markdown."""
    heads = ("shape", "rows", "µs", "GB/s", "GFLOP/s", "over bound", "torch bf16", "torch fp32")
    keys = ("shape", "rows", "us", "gb_s", "gflop_s", "over_bound", "torch_bf16", "torch_fp32")
    forms = ("{}", "{}", "{:.0f}", "{:.1f}", "{:.0f}", "{:.2f}", "{:.2f}x", "{:.2f}x")
    text = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in lines:
        cells = (form.format(line[key]) for form, key in zip(forms, keys, strict=True))
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=QWEN3_SHAPES)
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512")
    parser.add_argument("--kind", choices=sorted(KINDS), default="bf16", help="of packed weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--cold-mib", type=int, default=192, help="copies of the weights hold")
    parser.add_argument("--best", action="store_true", help="not medians: the best of each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    loaded = load()
    if loaded.compiled is None:
        parser.exit(1, f"no kernels: {loaded.reason}\n")
    torch.set_num_threads(options.threads)
    team = Team(loaded.compiled, options.threads)
    lines = []
    with torch.inference_mode():
        for shape in parse_shapes(options.shapes):
            contest = Contest(shape, KINDS[options.kind], team, options.cold_mib << 20)
            for rows in map(int, options.rows.split(",")):
                few = min(8, 64 // rows, (64 << 20) // contest.weight_bytes)
                calls = 1 if options.best else max(1, few)
                samples = contest.measure(rows, options.reps, calls)
                lines.append(contest.judge(rows, samples, options.best))
    team.close()
    print(f"kernels: {loaded.compiled.describe()}; {options.threads} threads\n")
    print(table(lines))
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
