"""Faults of routers: killed, frozen, asked to leave while clients stream through them."""

from __future__ import annotations

from xllm.cli.chaos.scenarios.signals import frozen, kill
from xllm.cli.chaos.stage import Stage

FROZEN_S = 3.0


async def kill_router(stage: Stage) -> None:
    """SIGKILL of one of several routers: its clients go on at another."""
    await stage.wait_load()
    victim = stage.pick("router")
    injection = await kill(stage, "F07", victim.name, victim.pid)
    await stage.settle(injection)


async def freeze_router(stage: Stage) -> None:
    """SIGSTOP of a router: its connections stay, and say nothing."""
    await stage.wait_load()
    victim = stage.pick("router")
    async with frozen(stage, "F07-freeze", victim.name, [victim.pid]) as injection:
        await stage.pause(FROZEN_S)
    await stage.settle(injection)
