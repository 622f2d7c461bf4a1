"""Settings of the index of cached blocks that each router holds (docs/kv-index.md)."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class KvIndexSettings:
    """A router's index of who has which blocks cached."""

    max_bytes: int = setting(
        256 << 20,
        "Memory of the index of one model, and of that of all KV cache daemons; 0: no index, and "
        "nothing is known of caches.",
        unit="bytes",
        low=0,
        high=1 << 36,
    )
    jitter_ms: int = setting(
        500,
        "A snapshot is asked for after a random part of this, so that routers do not ask at once.",
        unit="ms",
        low=0,
        high=60000,
    )
