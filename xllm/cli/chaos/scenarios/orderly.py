"""Ends that were asked for, under load: SIGTERM of each role, everything restarted in turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from xllm.cli.chaos.processes import is_alive
from xllm.cli.chaos.stage import Stage
from xllm.cli.chaos.verdict import Injection

DRAIN_S = 30.0


async def end_master(stage: Stage) -> None:
    """SIGTERM of a master: what it runs ends there."""
    await _end_one(stage, "F25-master", "master")


async def end_router(stage: Stage) -> None:
    """SIGTERM of a router: what it serves ends there."""
    await _end_one(stage, "F25-router", "router")


async def end_worker(stage: Stage) -> None:
    """SIGTERM of a worker behind its master's back."""
    await _end_one(stage, "F25-worker", "worker")


async def end_daemon(stage: Stage) -> None:
    """SIGTERM of the KV cache daemon."""
    await _end_one(stage, "F25-kvcache", "kvcache")


async def restart_all(stage: Stage) -> None:
    """SIGTERM of every process, one after the other, each back before the next."""
    await stage.wait_load()
    injection: Injection | None = None
    for kind in ("master", "kvcache", "router"):
        for victim in stage.cluster.named(kind):
            pid = victim.pid
            if injection is None:
                injection = stage.strike("F28", "every process", lambda: None)
            os.kill(pid, signal.SIGTERM)
            await stage.prove(injection, f"{victim.name} (pid {pid}) ended", _gone(pid), DRAIN_S)
            await stage.wait_whole()
    assert injection is not None
    await stage.settle(injection)


async def _end_one(stage: Stage, scenario: str, kind: str) -> None:
    await stage.wait_load()
    victim = stage.pick(kind)
    pid = victim.pid
    injection = stage.strike(scenario, victim.name, lambda: os.kill(pid, signal.SIGTERM))
    await stage.prove(injection, f"pid {pid} ended", _gone(pid), DRAIN_S)
    await stage.settle(injection)


def _gone(pid: int) -> Callable[[], bool]:
    return lambda: not is_alive(pid)
