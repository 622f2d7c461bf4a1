"""Faults of routers: killed, frozen, asked to leave while clients stream through them."""

from __future__ import annotations

import os
import signal

from xllm.cli.chaos.processes import is_alive, state_of
from xllm.cli.chaos.stage import Stage

FROZEN_S = 3.0


async def kill_router(stage: Stage) -> None:
    """SIGKILL of one of several routers: its clients go on at another."""
    await stage.wait_load()
    victim = stage.pick("router")
    pid = victim.pid
    injection = stage.strike("F07", victim.name, lambda: os.kill(pid, signal.SIGKILL))
    await stage.prove(injection, f"pid {pid} is gone", lambda: not is_alive(pid))
    await stage.settle(injection)


async def freeze_router(stage: Stage) -> None:
    """SIGSTOP of a router: its connections stay, and say nothing."""
    await stage.wait_load()
    victim = stage.pick("router")
    pid = victim.pid
    injection = stage.strike("F07-freeze", victim.name, lambda: os.kill(pid, signal.SIGSTOP))
    try:
        await stage.prove(injection, f"pid {pid} is in state T", lambda: state_of(pid) == "T")
        await stage.pause(FROZEN_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    await stage.settle(injection)
