"""Faults of the network between routers and instances, by the proxies before the instances."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from xllm.cli.chaos.fault_proxy import FaultProxy
from xllm.cli.chaos.stage import LOST, Stage
from xllm.cli.chaos.verdict import Injection

PARTITION_S = 3.0
BAD_NETWORK_S = 10.0
DELAY_S = 0.2
JITTER_S = 0.1
RESET_SHARE = 0.01
"""Of the connections, each second."""
_RESET_PERIOD_S = 0.25


async def part(stage: Stage) -> None:
    """Nothing passes between the routers and one instance."""
    await _silence(stage, "F18", up=True, down=True)


async def lose_words(stage: Stage) -> None:
    """An instance hears the routers, who do not hear it."""
    await _silence(stage, "F19-down", up=False, down=True)


async def lose_requests(stage: Stage) -> None:
    """The routers hear an instance that does not hear them."""
    await _silence(stage, "F19-up", up=True, down=False)


async def half_open(stage: Stage) -> None:
    """The instance's side of every connection is gone, and the routers' kernel does not know."""
    injection = await _end_connections(stage, "F19-half", FaultProxy.half_open, "half open")
    for proxy in _proxies_of(stage, injection.victim):
        proxy.cut()
    await stage.settle(injection)


async def cut_connections(stage: Stage) -> None:
    """Every connection to one instance is reset; it may be reached again at once."""
    await stage.settle(await _end_connections(stage, "F20-cut", FaultProxy.cut, "reset"))


async def spoil_bytes(stage: Stage) -> None:
    """One byte of what an instance says is wrong."""
    await stage.wait_load()
    name = stage.pick("master").name
    proxy = stage.proxies[f"{name}-instance"]
    num_before = proxy.num_corrupted

    def act() -> None:
        proxy.down.num_corrupt = 1

    injection = stage.strike("F20-spoil", name, act)
    await stage.prove(injection, "a byte was changed", lambda: proxy.num_corrupted > num_before)
    await stage.pause(1.0)
    await stage.settle(injection)


async def bad_network(stage: Stage) -> None:
    """Delays of 200 ms, give or take 100, and now and then a reset."""
    await stage.wait_load()
    proxies = list(stage.proxies.values())

    def act() -> None:
        for proxy in proxies:
            for way in (proxy.up, proxy.down):
                way.delay_s, way.jitter_s = DELAY_S, JITTER_S

    injection = stage.strike("F20", "all connections", act)
    num_cut = 0
    end = time.monotonic() + BAD_NETWORK_S
    while time.monotonic() < end:
        await asyncio.sleep(_RESET_PERIOD_S)
        for proxy in proxies:
            if stage.rng.random() < RESET_SHARE * _RESET_PERIOD_S:
                num_cut += proxy.cut()
    injection.notes["resets"] = num_cut
    silent = stage.count_events(injection, ("instance_silent",))
    injection.notes["silences"] = silent
    if silent and not num_cut:  # a connection that begins anew over such a network is silent
        injection.broken.append(f"{silent} times an instance was taken for dead")
    for proxy in proxies:
        proxy.heal()
    await stage.prove(injection, "all connections were slow", lambda: True)
    await stage.settle(injection)


async def _end_connections(
    stage: Stage, scenario: str, end: Callable[[FaultProxy], int], what: str
) -> Injection:
    """Do that to every connection of one instance, and wait until a router notices."""
    await stage.wait_load()
    name = stage.pick("master").name
    counts: list[int] = []
    proxies = _proxies_of(stage, name)
    injection = stage.strike(scenario, name, lambda: counts.extend(map(end, proxies)))
    num = sum(counts)
    await stage.prove(injection, f"{num} connections are {what}", lambda: num > 0)
    await stage.notice(injection, word=name)
    return injection


async def _silence(stage: Stage, scenario: str, *, up: bool, down: bool) -> None:
    await stage.wait_load()
    name = stage.pick("master").name
    proxies = _proxies_of(stage, name)
    num_before = sum(one.num_held for one in proxies)

    def act() -> None:
        for proxy in proxies:
            proxy.silence(up=up, down=down)

    injection = stage.strike(scenario, name, act)
    try:
        await stage.prove(
            injection,
            "the proxies hold bytes back",
            lambda: sum(one.num_held for one in proxies) > num_before,
        )
        await stage.notice(injection, LOST, name)
        await stage.pause(max(0.0, PARTITION_S - injection.detect_s))
    finally:
        for proxy in proxies:
            proxy.heal()
    healed = time.monotonic()
    await stage.settle(injection)
    # Not from the fault on, but from its end.
    injection.recover_s = max(0.0, injection.settled_at - healed)


def _proxies_of(stage: Stage, name: str) -> list[FaultProxy]:
    return [stage.proxies[f"{name}-instance"], stage.proxies[f"{name}-bus"]]
