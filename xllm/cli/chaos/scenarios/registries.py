"""Faults of the registry: gone, frozen, away while others die. Requests never feel them."""

from __future__ import annotations

import os
import signal

from xllm.cli.chaos.processes import is_alive
from xllm.cli.chaos.registry_process import RegistryProcess
from xllm.cli.chaos.scenarios.signals import frozen
from xllm.cli.chaos.stage import Stage

AWAY_S = 5.0
FROZEN_S = 12.0
"""More than twice a lease."""
LONG_S = 60.0
REGISTRY_BACK_S = 20.0


async def restart(stage: Stage) -> None:
    """SIGKILL of the registry; it comes back after a while."""
    await _away(stage, "F12", AWAY_S)


async def stay_away(stage: Stage) -> None:
    """No registry for a minute."""
    await _away(stage, "F14-long", LONG_S)


async def freeze(stage: Stage) -> None:
    """SIGSTOP of the registry for longer than all leases last: its clock stands, too."""
    await stage.wait_load()
    registry = stage.registry
    assert registry is not None
    async with frozen(stage, "F13", "the registry", [registry.pid]) as injection:
        await stage.pause(FROZEN_S)
    await stage.settle(injection)


async def lose_instance_meanwhile(stage: Stage) -> None:
    """An instance dies while there is no registry: it is left at once, and joins again later."""
    await stage.wait_load()
    registry = stage.registry
    assert registry is not None
    registry_pid = registry.pid
    victim = stage.pick("master")
    pid = victim.pid

    def act() -> None:
        registry.signal(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)

    injection = stage.strike("F14", f"the registry and {victim.name}", act)
    gone = f"pids {registry_pid} and {pid} are gone"
    await stage.prove(injection, gone, lambda: not is_alive(pid) and not is_alive(registry_pid))
    await stage.notice(injection, word=victim.name)
    await stage.pause(AWAY_S)
    await _bring_back(stage, registry)
    await stage.settle(injection)


async def _away(stage: Stage, scenario: str, seconds: float) -> None:
    await stage.wait_load()
    registry = stage.registry
    assert registry is not None
    pid = registry.pid
    injection = stage.strike(scenario, "the registry", lambda: registry.signal(signal.SIGKILL))
    await stage.prove(injection, f"pid {pid} is gone", lambda: not is_alive(pid))
    await stage.pause(seconds)
    await _bring_back(stage, registry)
    await stage.settle(injection)


async def _bring_back(stage: Stage, registry: RegistryProcess) -> None:
    registry.start()
    await stage.cluster.until(registry.is_listening, REGISTRY_BACK_S, "the registry's return")
