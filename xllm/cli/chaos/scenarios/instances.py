"""Faults of instances: their masters and workers killed, crashed, frozen."""

from __future__ import annotations

import os
import signal

from xllm.cli.chaos.processes import is_alive
from xllm.cli.chaos.scenarios.signals import frozen, kill
from xllm.cli.chaos.stage import LOST, Stage

FROZEN_S = 3.0
"""How long a frozen process stays so: three times what its detection may take."""
WORKER_LOST = ("worker_lost", *LOST)


async def kill_master(stage: Stage) -> None:
    """SIGKILL of a master; its worker dies with it."""
    await stage.wait_load()
    victim = stage.pick("master")
    injection = await kill(stage, "F01", victim.name, victim.pid)
    await stage.notice(injection, word=victim.name)
    await stage.settle(injection)


async def kill_all(stage: Stage) -> None:
    """SIGKILL of every master at once."""
    await stage.wait_load()
    pids = [one.pid for one in stage.cluster.named("master")]

    def act() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    injection = stage.strike("F02", "all instances", act)
    gone = f"pids {', '.join(map(str, pids))} are gone"
    await stage.prove(injection, gone, lambda: not any(map(is_alive, pids)))
    await stage.notice(injection)
    await stage.settle(injection)


async def kill_worker(stage: Stage) -> None:
    """SIGKILL of a worker: its master lives on and starts another."""
    await _end_worker(stage, "F03-kill", signal.SIGKILL)


async def crash_worker(stage: Stage) -> None:
    """A worker dies of SIGSEGV."""
    await _end_worker(stage, "F03-segv", signal.SIGSEGV)


async def freeze_master(stage: Stage) -> None:
    """SIGSTOP of a master and its worker; after SIGCONT they say what they had left to say."""
    await stage.wait_load()
    victim = stage.pick("master")
    pids = [victim.pid, *_workers_of(stage, victim.name)]
    await _freeze(stage, "F04", victim.name, pids, LOST)


async def freeze_worker(stage: Stage) -> None:
    """SIGSTOP of a worker alone: its master judges it, and ends it."""
    await stage.wait_load()
    victim = stage.pick("worker")
    await _freeze(stage, "F04-worker", victim.name, [victim.pid], WORKER_LOST)


async def _end_worker(stage: Stage, scenario: str, number: signal.Signals) -> None:
    await stage.wait_load()
    victim = stage.pick("worker")
    injection = await kill(stage, scenario, victim.name, victim.pid, number)
    await stage.notice(injection, WORKER_LOST)
    await stage.settle(injection)


async def _freeze(
    stage: Stage, scenario: str, name: str, pids: list[int], names: tuple[str, ...]
) -> None:
    async with frozen(stage, scenario, name, pids) as injection:
        await stage.notice(injection, names)
        await stage.pause(max(0.0, FROZEN_S - injection.detect_s))
    await stage.settle(injection)


def _workers_of(stage: Stage, master: str) -> list[int]:
    return [one.pid for one in stage.cluster.named("worker") if one.name.startswith(f"{master}/")]
