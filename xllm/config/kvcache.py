"""A node's KV cache daemon: its addresses and tiers."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class KvCacheSettings:
    """A node's KV cache daemon."""

    name: str = setting("", "Unique name of this daemon; empty: one is made.")
    endpoint: str = setting(
        "", "Where masters and workers connect; empty: ipc in the run directory."
    )
    bus_endpoint: str = setting(
        "", "Where heartbeats are published; empty: ipc in the run directory."
    )
    dram_bytes: int = setting(256 << 20, "Size of the DRAM tier.", unit="bytes", low=1 << 20)
