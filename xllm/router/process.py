"""The router's process: what a spawned child runs."""

from __future__ import annotations

from xllm.config.load import decode_settings
from xllm.protocol.actor.run import run_role
from xllm.router.actor import RouterActor, router_name


def main(settings: bytes) -> None:
    """Run one router to its end; `settings` as `encode_settings` wrote them. Never returns."""
    decoded = decode_settings(settings)
    run_role(
        "router",
        router_name(decoded),
        decoded.cluster,
        lambda: RouterActor(decoded),
        fault_hooks=decoded.chaos.hooks,
    )
