"""Faults of the KV cache daemon: killed, frozen. What it held is computed again."""

from __future__ import annotations

import os
import signal

from xllm.cli.chaos.processes import is_alive, state_of
from xllm.cli.chaos.stage import Stage

FROZEN_S = 10.0


async def kill_daemon(stage: Stage) -> None:
    """SIGKILL of the KV cache daemon."""
    await stage.wait_load()
    victim = stage.pick("kvcache")
    pid = victim.pid
    injection = stage.strike("F21-kill", victim.name, lambda: os.kill(pid, signal.SIGKILL))
    await stage.prove(injection, f"pid {pid} is gone", lambda: not is_alive(pid))
    await stage.settle(injection)


async def freeze_daemon(stage: Stage) -> None:
    """SIGSTOP of the KV cache daemon for ten seconds."""
    await stage.wait_load()
    victim = stage.pick("kvcache")
    pid = victim.pid
    injection = stage.strike("F21-freeze", victim.name, lambda: os.kill(pid, signal.SIGSTOP))
    try:
        await stage.prove(injection, f"pid {pid} is in state T", lambda: state_of(pid) == "T")
        await stage.pause(FROZEN_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    await stage.settle(injection)
