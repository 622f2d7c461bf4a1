"""Faults of the KV cache daemon: killed, frozen. What it held is computed again."""

from __future__ import annotations

from xllm.cli.chaos.scenarios.signals import frozen, kill
from xllm.cli.chaos.stage import Stage

FROZEN_S = 10.0


async def kill_daemon(stage: Stage) -> None:
    """SIGKILL of the KV cache daemon."""
    await stage.wait_load()
    victim = stage.pick("kvcache")
    injection = await kill(stage, "F21-kill", victim.name, victim.pid)
    await stage.settle(injection)


async def freeze_daemon(stage: Stage) -> None:
    """SIGSTOP of the KV cache daemon for ten seconds."""
    await stage.wait_load()
    victim = stage.pick("kvcache")
    async with frozen(stage, "F21-freeze", victim.name, [victim.pid]) as injection:
        await stage.pause(FROZEN_S)
    await stage.settle(injection)
