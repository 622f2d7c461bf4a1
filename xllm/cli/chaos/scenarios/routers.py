"""Faults of routers: killed, frozen, asked to leave while clients stream through them."""

from __future__ import annotations

from xllm.cli.chaos.scenarios.signals import freeze_one, kill_one
from xllm.cli.chaos.stage import Stage

FROZEN_S = 3.0


async def kill_router(stage: Stage) -> None:
    """SIGKILL of one of several routers: its clients go on at another."""
    await kill_one(stage, "F07", "router")


async def freeze_router(stage: Stage) -> None:
    """SIGSTOP of a router: its connections stay, and say nothing."""
    await freeze_one(stage, "F07-freeze", "router", FROZEN_S)
