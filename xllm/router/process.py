"""The router's process: what a spawned child runs."""

from __future__ import annotations

from xllm.config.load import decode_settings
from xllm.protocol.actor.logs import configure_logs
from xllm.protocol.actor.run import run_child
from xllm.router.actor import RouterActor, router_name


def main(settings: bytes) -> None:
    """Run one router to its end; `settings` as `encode_settings` wrote them. Never returns."""
    decoded = decode_settings(settings)
    cluster = decoded.cluster
    configure_logs(
        process=router_name(decoded),
        level=cluster.log_level,
        log_format=cluster.log_format,
        log_dir=cluster.log_dir,
    )
    run_child(lambda: RouterActor(decoded))
