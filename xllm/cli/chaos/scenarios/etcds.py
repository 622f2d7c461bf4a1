"""Faults of etcd that stop nothing: history gone, a lease revoked, no room left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from xllm.cli.chaos.etcd_control import EtcdControl
from xllm.cli.chaos.processes import is_alive
from xllm.cli.chaos.stage import InvalidRunError, Stage
from xllm.cli.chaos.verdict import Injection
from xllm.errors import DeadlineError
from xllm.protocol.records import instance_key

BACK_S = 2.0
"""A revoked lease is replaced within this time, and a compacted history listed anew."""
RETURN_S = 20.0


async def compact_meanwhile(stage: Stage) -> None:
    """Routers cannot hear etcd, and what changes meanwhile is compacted: they list anew."""
    await stage.wait_load()
    etcd = _control(stage)
    routers = stage.cluster.named("router")
    proxies = [stage.proxies[f"{one.name}-registry"] for one in routers]
    name = stage.pick("master").name
    key = instance_key(stage.cluster.directory.name, name)

    def act() -> None:
        for proxy in proxies:
            proxy.silence()

    injection = stage.strike("F15", "the routers", act)
    try:
        await _say_degraded(stage, injection, len(routers))
        lease = await etcd.lease_of(key)
        await etcd.revoke(lease)
        await stage.until(lambda: _replaced(etcd, key, lease), RETURN_S, f"another lease of {name}")
        revision = await etcd.compact()
        injection.proofs.append(f"{name} was written anew, history before {revision} is gone")
    except DeadlineError as error:
        injection.broken.append(error.message)
    finally:
        for proxy in proxies:
            proxy.heal()
    await _say_whole(stage, injection)
    await stage.settle(injection)
    _check_unmoved(injection)


async def revoke_lease(stage: Stage) -> None:
    """Somebody revokes an instance's lease: it registers again, and its streams go on there."""
    etcd = _control(stage)
    name = stage.pick("master").name
    key = instance_key(stage.cluster.directory.name, name)
    lease, record = await etcd.lease_of(key), await etcd.value_of(key)
    await stage.wait_load()
    injection = stage.strike("F16", name, lambda: None)
    await etcd.revoke(lease)
    injection.proofs.append(f"{name}: lease {lease:x} was revoked")
    try:
        took_s = await stage.until(lambda: _replaced(etcd, key, lease), RETURN_S, "its return")
    except DeadlineError as error:
        injection.broken.append(error.message)
    else:
        injection.notes["registered_again_s"] = round(took_s, 2)
        if took_s > BACK_S * stage.cluster.options.slack:
            injection.broken.append(f"it was back after {took_s:.1f} s, not {BACK_S:g}")
        if await etcd.value_of(key) != record:
            injection.broken.append("it came back as another one")
    await stage.settle(injection)
    _check_unmoved(injection)


async def fill_up(stage: Stage) -> None:
    """etcd has no room, and an instance dies: it joins again when there is room."""
    etcd = _control(stage)
    victim = stage.pick("master")
    pid = victim.pid
    num_mb = await etcd.fill()
    await stage.wait_load()
    injection = stage.strike("F17", victim.name, lambda: os.kill(pid, signal.SIGKILL))
    try:
        alarms = await etcd.alarms()
        await stage.prove(
            injection,
            f"etcd is full after {num_mb} MB ({' '.join(alarms.split())}), pid {pid} is gone",
            lambda: "NOSPACE" in alarms and not is_alive(pid),
        )
        await stage.notice(injection, word=victim.name)
        await _say_degraded(stage, injection, at_least=1)  # the leader's: it writes each second
    finally:
        await etcd.make_room()
    await stage.settle(injection)
    await _say_whole(stage, injection)


def _control(stage: Stage) -> EtcdControl:
    registry = stage.registry
    assert registry is not None
    if registry.kind != "etcd":
        raise InvalidRunError("this needs an etcd of its own")
    return EtcdControl(f"127.0.0.1:{registry.port}")


async def _replaced(etcd: EtcdControl, key: str, lease: int) -> bool:
    return await etcd.lease_of(key) not in (0, lease)


async def _say_degraded(stage: Stage, injection: Injection, at_least: int) -> None:
    """Until so many routers say that the registry does not do as it should."""
    await _until_said(stage, injection, lambda count: count >= at_least, "routers say so")


async def _say_whole(stage: Stage, injection: Injection) -> None:
    """Until no router says so any more."""
    await _until_said(stage, injection, lambda count: not count, "routers are content")


async def _until_said(
    stage: Stage, injection: Injection, enough: Callable[[int], bool], what: str
) -> None:
    async def said() -> bool:
        parts = [(await probe.health(timeout_s=2.0)).degraded for probe in stage.load.probes]
        return enough(sum(any("registry" in part for part in one) for one in parts))

    try:
        await stage.until(said, RETURN_S, what)
    except DeadlineError as error:
        injection.broken.append(error.message)


def _check_unmoved(injection: Injection) -> None:
    if injection.gaps_s:
        injection.broken.append(f"{len(injection.gaps_s)} streams went elsewhere for nothing")
