"""The matrix products of a model's step alone, in the line protocol of the peers' drivers.

    python -m benchmarks.bare --model DIR [--threads 2] [--dtype bfloat16] [--rows 1,16,32]

Answers any workload with `products_s`: by rows, the seconds that all products of a step (each
layer's, and the head) take one after the other, over weights of the model's shapes: what no
scheduling, attention or sampling could be faster than. They are the compiled kernels' over packed
weights where the library was built, else torch's; READY says which. The weights are drawn at
random: products take the same time for any values.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.linear import Epilogue, PackedLinear, pack_gate_up, pack_linear
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.team import Team
from xllm.worker.layers.linear import Linear
from xllm.worker.loader.config import ModelConfig, read_config
from xllm.worker.models.registry import find_family

PASSES = 5


def shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of every product of a step: fused as the engine fuses them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = [(heads + 2 * kv_heads, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner)]
    return layer * config.num_layers + [(config.vocab_size, hidden)]


class BareProducts:
    """The linear maps of one model; `measure` runs them all. `team` computes; None: torch."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, team: Team | None) -> None:
        self._dtype = torch.float32 if team else dtype
        self._maps: list[tuple[Callable[[torch.Tensor], object], int]] = []
        gated = (2 * config.intermediate_size, config.hidden_size)
        for shape in shapes(config):
            weight = torch.randn(shape).to(dtype)
            self._maps.append((_linear_map(weight, shape == gated, team), shape[1]))
        self.weight_bytes = dtype.itemsize * sum(out * inputs for out, inputs in shapes(config))

    def measure(self, num_rows: int) -> float:
        """Seconds of one pass over all products: the median of some."""
        sizes = {inputs for _, inputs in self._maps}
        inputs = {size: torch.randn(num_rows, size).to(self._dtype) for size in sizes}
        seconds = []
        with torch.inference_mode():
            for _ in range(PASSES + 1):
                began = time.perf_counter()
                for apply, size in self._maps:
                    apply(inputs[size])
                seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])


def _linear_map(
    weight: torch.Tensor, is_gated: bool, team: Team | None
) -> Callable[[torch.Tensor], object]:
    if team is None:
        return Linear(weight)
    kind = Kind.BF16 if weight.dtype == torch.bfloat16 else Kind.FP32
    if not is_gated:
        return pack_linear(kind, weight, None, team)
    packed: PackedLinear = pack_gate_up(kind, *weight.chunk(2), team)
    return functools.partial(packed, epilogue=Epilogue.SILU_MUL)


def main() -> None:
    """Answer lines until there are none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", default="1,16,32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    raw = read_config(Path(options.model))
    config = find_family(raw.architecture()).read(raw)
    loaded = load()
    team = Team(loaded.compiled, options.threads) if loaded.compiled else None
    products = BareProducts(config, getattr(torch, options.dtype), team)
    row_counts = [int(text) for text in options.rows.split(",")]
    meta = {"peer": "bare", "weight_bytes": products.weight_bytes}
    meta["kernels"] = "compiled" if team else f"torch: {loaded.reason}"
    print("READY " + json.dumps(meta), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("quit"):
            break
        result = {
            "products_s": {num_rows: products.measure(num_rows) for num_rows in row_counts},
            "weight_bytes": products.weight_bytes,
            "workload": command["workload"],
            "rep": command["rep"],
        }
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
