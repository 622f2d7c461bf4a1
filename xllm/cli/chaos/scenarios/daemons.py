"""Faults of the KV cache daemon: killed, frozen. What it held is computed again."""

from __future__ import annotations

from xllm.cli.chaos.scenarios.signals import freeze_one, kill_one
from xllm.cli.chaos.stage import Stage

FROZEN_S = 10.0


async def kill_daemon(stage: Stage) -> None:
    """SIGKILL of the KV cache daemon."""
    await kill_one(stage, "F21-kill", "kvcache")


async def freeze_daemon(stage: Stage) -> None:
    """SIGSTOP of the KV cache daemon for ten seconds."""
    await freeze_one(stage, "F21-freeze", "kvcache", FROZEN_S)
