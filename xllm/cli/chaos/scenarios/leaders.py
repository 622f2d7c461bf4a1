"""Faults of the router that leads: killed, frozen for longer than its lease, cut off."""

from __future__ import annotations

import time

from xllm.cli.chaos.scenarios.signals import frozen, kill
from xllm.cli.chaos.stage import Stage
from xllm.cli.chaos.verdict import Injection
from xllm.config.cluster import ClusterSettings

LEASE_S = ClusterSettings().lease_s
FROZEN_S = LEASE_S + 4.0
TAKEOVER_S = 4 * LEASE_S
"""How long a new leader is waited for, however late it is."""


async def kill_leader(stage: Stage) -> None:
    """SIGKILL of the router that leads."""
    await stage.wait_load()
    name, epoch = await stage.leader()
    injection = await kill(stage, "F09", name, stage.cluster.processes[name].pid)
    await _wait_next(stage, injection, name, epoch)
    await stage.settle(injection)


async def freeze_leader(stage: Stage) -> None:
    """SIGSTOP of the router that leads, until another one does; then it goes on."""
    await stage.wait_load()
    name, epoch = await stage.leader()
    pid = stage.cluster.processes[name].pid
    async with frozen(stage, "F10", name, [pid]) as injection:
        await _wait_next(stage, injection, name, epoch)
        await stage.pause(max(0.0, injection.at + FROZEN_S - time.monotonic()))
    await stage.settle(injection)
    await _check_one(stage, injection, epoch)


async def cut_leader_off(stage: Stage) -> None:
    """The leader hears the registry no more, and everybody else as before."""
    await stage.wait_load()
    name, epoch = await stage.leader()
    proxy = stage.proxies[f"{name}-registry"]
    num_before = proxy.num_held
    injection = stage.strike("F11", name, proxy.silence)
    try:
        await stage.prove(
            injection, "the proxy holds bytes back", lambda: proxy.num_held > num_before, LEASE_S
        )
        await _wait_next(stage, injection, name, epoch)
    finally:
        proxy.heal()
    ended = stage.find_event(injection, "leadership_ends", name)
    begun = stage.find_event(injection, "leadership_begins", "")
    if ended is None or begun is None or ended.at > begun.at:
        injection.broken.append("the old leader had not stepped down before another began")
    else:
        injection.notes["apart_ms"] = round((begun.at - ended.at) * 1000)
    await stage.settle(injection)
    await _check_one(stage, injection, epoch)


async def _wait_next(stage: Stage, injection: Injection, old: str, epoch: int) -> None:
    """Until another router leads under a higher epoch."""
    end = time.monotonic() + TAKEOVER_S
    while time.monotonic() < end:
        name, now = await stage.leader(asking_not=old)
        if name and name != old and now > epoch:
            injection.detect_s = time.monotonic() - injection.at
            return
        await stage.pause(0.05)
    injection.broken.append(f"no router led within {TAKEOVER_S:g} s")


async def _check_one(stage: Stage, injection: Injection, epoch: int) -> None:
    """All routers know the same leader, whose epoch is higher than that of before."""
    found: set[tuple[str, int]] = set()

    async def agree() -> bool:
        found.clear()
        found.update(await stage.leaders())
        return len(found) == 1 and next(iter(found))[1] > epoch

    end = time.monotonic() + LEASE_S
    while not await agree():
        if time.monotonic() > end:
            injection.broken.append(f"routers know these leaders: {sorted(found)}")
            return
        await stage.pause(0.1)
