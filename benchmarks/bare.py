"""The matrix products of a model's step alone, in the line protocol of the peers' drivers.

    python -m benchmarks.bare --model DIR [--threads 2] [--dtype bfloat16] [--rows 1,16,32]

Answers any workload with `products_s`: by rows, the seconds that all products of a step (each
layer's, and the head) take one after the other, through the engine's own linear map over weights
of the model's shapes: what no scheduling, attention or sampling could be faster than. The weights
are drawn at random: products take the same time for any values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

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
    """The linear maps of one model; `measure` runs them all."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._maps = [
            (Linear(torch.randn(out, inputs).to(dtype)), inputs) for out, inputs in shapes(config)
        ]
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
    products = BareProducts(config, getattr(torch, options.dtype))
    row_counts = [int(text) for text in options.rows.split(",")]
    print(
        "READY " + json.dumps({"peer": "bare", "weight_bytes": products.weight_bytes}), flush=True
    )
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
