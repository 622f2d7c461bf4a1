"""The router's process: what a spawned child runs."""

from __future__ import annotations

import sys

from xllm.config.load import decode_settings
from xllm.protocol.actor.run import run_role
from xllm.router.actor import RouterActor, router_name

SWITCH_S = 0.0005
"""A thread that hashes a long prompt gives the interpreter back to the loop after so long, if the
loop wants it: all other requests wait for that. Python's own limit is ten times as much."""


def main(settings: bytes) -> None:
    """Run one router to its end; `settings` as `encode_settings` wrote them. Never returns."""
    decoded = decode_settings(settings)
    sys.setswitchinterval(SWITCH_S)
    run_role(
        "router",
        router_name(decoded),
        decoded.cluster,
        lambda: RouterActor(decoded),
        fault_hooks=decoded.chaos.hooks,
    )
