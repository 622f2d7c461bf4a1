"""The KV cache daemon's process: what a spawned child runs."""

from __future__ import annotations

from xllm.config.load import decode_settings
from xllm.kvcache.daemon import KvCacheDaemon, daemon_name
from xllm.protocol.actor.run import run_role


def main(settings: bytes) -> None:
    """Run one daemon to its end; `settings` as `encode_settings` wrote them. Never returns."""
    decoded = decode_settings(settings)
    run_role(
        "kvcache",
        daemon_name(decoded),
        decoded.cluster,
        lambda: KvCacheDaemon(decoded),
        fault_hooks=decoded.chaos.hooks,
    )
