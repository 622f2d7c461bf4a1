"""The kinds of KV that a configuration keeps."""

from __future__ import annotations

import dataclasses

from xllm.worker.loader.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class KvGroupSpec:
    """Layers whose KV has one form: per token num_kv_heads x head_dim keys and values, of which
    a token sees the last `window` (0: all)."""

    name: str
    window: int
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int


def kv_groups(config: ModelConfig) -> tuple[KvGroupSpec, ...]:
    """One group a distinct window, the full one first."""
    groups = []
    for window in sorted(set(config.layer_windows)):
        layers = tuple(i for i, found in enumerate(config.layer_windows) if found == window)
        name = "full" if window == 0 else f"window-{window}"
        groups.append(KvGroupSpec(name, window, layers, config.num_kv_heads, config.head_dim))
    return tuple(groups)
