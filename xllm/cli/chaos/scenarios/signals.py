"""Processes killed and stopped by signals, and the proof that they were."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence

from xllm.cli.chaos.processes import is_alive, state_of
from xllm.cli.chaos.stage import Stage
from xllm.cli.chaos.verdict import Injection


async def kill(
    stage: Stage, scenario: str, name: str, pid: int, number: signal.Signals = signal.SIGKILL
) -> Injection:
    """End a process by a signal, and return once it is gone."""
    injection = stage.strike(scenario, name, lambda: os.kill(pid, number))
    if "/" not in name:
        injection.ended = name  # by the launcher's own account; workers are their master's
    await stage.prove(injection, f"pid {pid} is gone", lambda: not is_alive(pid))
    return injection


@contextlib.asynccontextmanager
async def frozen(
    stage: Stage, scenario: str, name: str, pids: Sequence[int]
) -> AsyncIterator[Injection]:
    """SIGSTOP for the length of the block, which begins once all are stopped. Those that others
    end meanwhile are left alone at its end."""
    injection = stage.strike(scenario, name, lambda: _signal(pids, signal.SIGSTOP))
    try:
        listed = ", ".join(map(str, pids))
        await stage.prove(
            injection, f"in state T: {listed}", lambda: all(state_of(p) == "T" for p in pids)
        )
        yield injection
    finally:
        _signal(pids, signal.SIGCONT)


async def kill_one(stage: Stage, scenario: str, kind: str) -> None:
    """SIGKILL, under load, of one of a kind that requests do without."""
    await stage.wait_load()
    victim = stage.pick(kind)
    await stage.settle(await kill(stage, scenario, victim.name, victim.pid))


async def freeze_one(stage: Stage, scenario: str, kind: str, seconds: float) -> None:
    """SIGSTOP, under load, of one of a kind that requests do without."""
    await stage.wait_load()
    victim = stage.pick(kind)
    async with frozen(stage, scenario, victim.name, [victim.pid]) as injection:
        await stage.pause(seconds)
    await stage.settle(injection)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, number)
