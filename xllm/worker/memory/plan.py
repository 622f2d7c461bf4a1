"""What a device's memory goes to: weights, KV, and what a step computes with.

All but `log_plan` is numbers only.
"""

from __future__ import annotations

import dataclasses

import structlog

from xllm.config.scheduling import max_drawn_rows, max_rows_each
from xllm.config.settings import Settings
from xllm.worker.graphs.footprint import NO_GRAPHS, GraphFootprint
from xllm.worker.loader.config import ModelConfig
from xllm.worker.memory.kv_memory import KvShape
from xllm.worker.platform.platform import Platform

log = structlog.get_logger(__name__)

_FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of a device. `activation_bytes`, `graph_bytes`: see there."""

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    graph_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The peak that is expected."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.graph_bytes


def activation_bytes(config: ModelConfig, item_bytes: int, max_tokens: int, max_rows: int) -> int:
    """What the largest step takes beside weights and KV: the most of

    - attention: T x (2 h + (2 H + 2 K) d + H d) x item: the residual and its norm, queries before
      and after the rotation, keys and values, and the result;
    - the network: T x (2 h + 3 m) x item: the residual and its norm, gate, up and their product;
      with experts m is the sum over those that a token goes to;
    - drawing: T x h x item + R x V x (item + 8): the last layer's rows, the logits of the rows that
      draw, and twice as float32 (the numbers, and what is made of them);

    with T `max_tokens` of a step, R `max_rows` that draw, h the hidden size, H and K heads of
    queries and of keys of d numbers, V the vocabulary, `item_bytes` of a number.
    """
    return max(
        max_tokens * _row_numbers(config) * item_bytes,
        max_tokens * config.hidden_size * item_bytes + _draw_bytes(config, item_bytes, max_rows),
    )


def _draw_bytes(config: ModelConfig, item_bytes: int, rows: int) -> int:
    return rows * config.vocab_size * (item_bytes + 2 * _FLOAT_BYTES)


def graph_bytes(config: ModelConfig, item_bytes: int, max_rows: int, max_batch: int) -> int:
    """What captured steps of up to `max_rows` rows, of which `max_batch` draw, hold for themselves:
    the memory that they share, as of a step that is not captured, and what one leaves for another
    or for the attention between: T x (2 H d + 3 h) x item + T x d x 4, queries, results, three
    states of the rows, angles."""
    heads, dim = config.num_heads * config.head_dim, config.head_dim
    left = (2 * heads + 3 * config.hidden_size) * item_bytes + dim * _FLOAT_BYTES
    shared = max_rows * _row_numbers(config) * item_bytes
    return max(shared, _draw_bytes(config, item_bytes, max_batch)) + max_rows * left


def _row_numbers(config: ModelConfig) -> int:
    """Numbers that a row takes in a layer, at most."""
    hidden, dim = config.hidden_size, config.head_dim
    width = config.intermediate_size
    if config.experts is not None:
        width = max(width, config.experts.top_k * config.experts.intermediate_size)
    attention = 2 * hidden + (3 * config.num_heads + 2 * config.num_kv_heads) * dim
    return max(attention, 2 * hidden + 3 * width)


def step_bytes(
    settings: Settings,
    config: ModelConfig,
    item_bytes: int,
    platform: Platform,
    graphs: GraphFootprint = NO_GRAPHS,
) -> tuple[int, int]:
    """What the steps of a device take beside weights and KV: activations, graphs with what the
    driver has for them."""
    scheduler, worker = settings.scheduler, settings.worker
    most, rows, batch = scheduler.max_num_seqs, 0, 0
    is_launched = platform.kernels == "triton" and not worker.deterministic
    if is_launched and settings.master.num_workers == 1 and config.experts is None:
        batch = min(worker.graph_max_batch, most) * max_rows_each(scheduler)
        rows = max(worker.graph_max_rows, batch)
    drawn = max_drawn_rows(scheduler)
    return (
        activation_bytes(config, item_bytes, scheduler.max_num_batched_tokens, drawn),
        graph_bytes(config, item_bytes, rows, batch) + graphs.driver_bytes,
    )


def log_plan(
    settings: Settings,
    config: ModelConfig,
    shape: KvShape,
    weight_bytes: int,
    platform: Platform,
    graphs: GraphFootprint = NO_GRAPHS,
) -> MemoryPlan:
    """Say at the start what a device's memory will go to; a warning where it has not as much."""
    steps = step_bytes(settings, config, shape.item_bytes, platform, graphs)
    plan = MemoryPlan(weight_bytes, shape.num_blocks * shape.block_bytes, *steps)
    device_bytes = platform.memory().total_bytes
    say = log.warning if plan.total_bytes > device_bytes else log.info
    say(
        "memory_plan",
        weight_bytes=plan.weight_bytes,
        kv_bytes=plan.kv_bytes,
        activation_bytes=plan.activation_bytes,
        graph_bytes=plan.graph_bytes,
        graph_driver_bytes=graphs.driver_bytes,
        total_bytes=plan.total_bytes,
        device_bytes=device_bytes,
    )
    return plan
