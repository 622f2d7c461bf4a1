"""What kernels of a decoder layer must move and multiply, and how near to that they come.

Numbers only. A kernel's bound is the larger of its bytes over the copy bandwidth and its operations
over the rate of matrix products, both measured in the same run; its part of the roofline is that
bound over the time that it took. Bytes are those that any implementation moves: inputs once,
outputs once, each key and value once for all heads that share it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks import random_model

ITEM_BYTES = 2
"""bfloat16."""


@dataclasses.dataclass(frozen=True)
class DeviceShape:
    """The sizes of a model's decoder layers."""

    name: str
    num_layers: int
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES

    def layers_within(self, tokens: int, budget_bytes: int) -> int:
        """How many layers' KV of so many tokens a budget holds: at least one, at most all."""
        return max(min(self.num_layers, budget_bytes // max(tokens * self.token_bytes, 1)), 1)


def _shape(name: str) -> DeviceShape:
    sizes = random_model.SHAPES[name]
    return DeviceShape(
        f"qwen3-{name}",
        sizes["num_hidden_layers"],
        sizes["hidden_size"],
        sizes["intermediate_size"],
        sizes["num_attention_heads"],
        sizes["num_key_value_heads"],
        sizes["head_dim"],
    )


SHAPES = {f"qwen3-{name}": _shape(name) for name in ("0.6b", "1.7b", "4b", "8b")}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes to and from the device's memory, and floating-point operations, of one call."""

    num_bytes: int
    operations: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the device did in this run: bytes a second of a copy (read and written), operations a
    second of a matrix product."""

    bandwidth: float
    rate: float

    def seconds(self, cost: Cost) -> float:
        """The least time that a call with this cost can take."""
        return max(cost.num_bytes / self.bandwidth, cost.operations / self.rate)


def attention_cost(shape: DeviceShape, num_seqs: int, rows: int, length: int) -> Cost:
    """Of `num_seqs` sequences of `length` keys, whose last `rows` tokens attend."""
    seen = rows * length - rows * (rows - 1) // 2
    moved = 2 * rows * shape.num_heads * shape.head_dim * ITEM_BYTES  # queries and results
    return Cost(
        num_seqs * (length * shape.token_bytes + moved),
        num_seqs * 4 * seen * shape.num_heads * shape.head_dim,
    )


def write_cost(shape: DeviceShape, rows: int) -> Cost:
    """Of norms and rotation of q and k and the writing of k and v: each head is read and written,
    with fp32 cosines and sines, an address and a position a row."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    return Cost(rows * (2 * heads * shape.head_dim * ITEM_BYTES + 4 * shape.head_dim + 12), 0)


def norm_cost(shape: DeviceShape, rows: int) -> Cost:
    """Of a norm behind a sum: two inputs, the sum and the norm."""
    return Cost((4 * rows + 1) * shape.hidden * ITEM_BYTES, 0)


def gate_cost(shape: DeviceShape, rows: int) -> Cost:
    """Of silu(gate) * up."""
    return Cost(3 * rows * shape.inner * ITEM_BYTES, 0)


def line(
    shape: DeviceShape, kernel: str, case: str, cost: Cost, seconds: float, limits: Limits
) -> dict[str, Any]:
    """One row of the table: a call's time, what it reached, and its part of the roofline."""
    return {
        "shape": shape.name,
        "kernel": kernel,
        "case": case,
        "us": seconds * 1e6,
        "gb_s": cost.num_bytes / seconds / 1e9,
        "tflop_s": cost.operations / seconds / 1e12,
        "of_roofline": limits.seconds(cost) / seconds,
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines in Markdown."""
    found = ["| shape | kernel | case | us | GB/s | TFLOP/s | of the roofline |"]
    found.append("|---|---|---|---:|---:|---:|---:|")
    found += [
        f"| {x['shape']} | {x['kernel']} | {x['case']} | {x['us']:.2f} | {x['gb_s']:.0f} "
        f"| {x['tflop_s']:.1f} | {x['of_roofline']:.2f} |"
        for x in lines
    ]
    return "\n".join(found)


def against_tables(lines: Sequence[dict[str, Any]]) -> str:
    """For each attention the time over block tables divided by that over slots, in Markdown."""
    times = {(x["shape"], x["case"], x["kernel"]): x["us"] for x in lines}
    found = ["| shape | case | block tables | block tables of 16 tokens |", "|---|---|---:|---:|"]
    for (shape, case, kernel), us in times.items():
        arms = [f"{kernel}, tables", f"{kernel}, tables of 16"]
        if all((shape, case, arm) in times for arm in arms):
            ratios = " | ".join(f"{times[shape, case, arm] / us:.3f}" for arm in arms)
            found.append(f"| {shape} | {kernel}, {case} | {ratios} |")
    return "\n".join(found)
