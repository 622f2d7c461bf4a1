"""The key that the routers of a cluster sign with, so that each knows what the others gave out.

It lies in the registry, made by the first router that finds none; it ends with the registry's
memory, or when it is deleted, and then holds until the routers start again.
"""

from __future__ import annotations

import os

from xllm.protocol.records import secret_key
from xllm.protocol.registry.interface import Registry

KEY_BYTES = 32


async def shared_key(registry: Registry, cluster: str) -> bytes:
    """The cluster's key. Raises what the registry raises."""
    name = secret_key(cluster, "events")
    entry = await registry.get(name)
    while entry is None:
        await registry.compare_and_set(name, 0, os.urandom(KEY_BYTES))
        entry = await registry.get(name)  # ours, or that of a router that was faster
    return entry.value
