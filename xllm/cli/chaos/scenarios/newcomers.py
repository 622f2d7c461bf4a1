"""Instances that join a running cluster: of other versions, and of another clock."""

from __future__ import annotations

import os

from xllm.cli.chaos import other_clock
from xllm.cli.chaos.joining import Newcomer
from xllm.cli.chaos.scenarios.alarms import Quiet
from xllm.cli.chaos.stage import Stage
from xllm.cli.chaos.verdict import Injection
from xllm.errors import DeadlineError, XllmError
from xllm.protocol.message import OLDEST_PROTOCOL, PROTOCOL_VERSION
from xllm.protocol.questions import ProcessStatus

JOIN_S = 60.0
SERVE_S = 1.0
REFUSED = ("protocol_unsupported",)


async def join_other_clock(stage: Stage) -> None:
    """An instance joins whose monotonic clock is a day ahead of everybody's."""
    await stage.wait_load()
    one = Newcomer(stage.cluster, "instance-ahead", wrapper=other_clock.wrapper())
    injection = stage.strike("F29-apart", one.name, one.start)
    try:
        await _serve(stage, injection, one)
        theirs, ours = (os.stat(f"/proc/{who}/ns/time").st_ino for who in (one.pid, "self"))
        ahead_s = other_clock.offset_of(one.pid)
        await stage.prove(
            injection,
            f"pid {one.pid} is {ahead_s} s ahead",
            lambda: theirs != ours and ahead_s == other_clock.AHEAD_S,
        )
        await _leave(injection, one)
    finally:
        one.close()
    await stage.settle(injection)


async def join_other_versions(stage: Stage) -> None:
    """Three instances join: one of a later version that speaks our protocol, whose messages have
    fields more; and two that say they speak protocols of before and after ours."""
    await stage.wait_load()
    versions = {
        "instance-later": PROTOCOL_VERSION,
        "instance-before": OLDEST_PROTOCOL - 1,
        "instance-after": PROTOCOL_VERSION + 1,
    }
    all_of = [
        Newcomer(stage.cluster, name, flags=("--speak", str(version)))
        for name, version in versions.items()
    ]

    def start_all() -> None:
        for one in all_of:
            one.start()

    injection = stage.strike("F30", "three newcomers", start_all)
    later, *strangers = all_of
    try:
        for one in strangers:
            await stage.notice(injection, REFUSED, one.name, JOIN_S)
            await _name_in_health(stage, injection, one.name)
        await _serve(stage, injection, later)
        for one in strangers:
            if any(known is not None for known in await _known(stage, one.name)):
                injection.broken.append(f"{one.name} is used, though nobody understands it")
            if one.has_ended:
                injection.broken.append(f"{one.name} ended")
        for one in all_of:
            await _leave(injection, one)
    finally:
        for one in all_of:
            one.close()
    injection.detect_s = -1.0  # a start is no fault: what it took says nothing
    await stage.settle(injection)


async def _serve(stage: Stage, injection: Injection, one: Newcomer) -> None:
    """Until every router uses it and streams run there; then for a while longer."""
    num_before = 0
    quiet = Quiet(stage)

    async def serves() -> bool:
        nonlocal num_before
        known = await _known(stage, one.name)
        num_before = max((it.num_running for it in known if it is not None), default=0)
        return num_before > 0 and all(it is not None and it.state == "ready" for it in known)

    try:
        await stage.until(serves, JOIN_S, f"{one.name} joins and serves")
    except DeadlineError as error:
        injection.broken.append(error.message)
        return
    injection.proofs.append(f"{one.name} (pid {one.pid}) runs {num_before} sequences")
    await stage.pause(SERVE_S)
    quiet.check(injection)


async def _leave(injection: Injection, one: Newcomer) -> None:
    try:
        await one.leave()
    except DeadlineError as error:
        injection.broken.append(error.message)


async def _name_in_health(stage: Stage, injection: Injection, name: str) -> None:
    async def named() -> bool:
        for probe in stage.load.probes:
            parts = (await probe.health(timeout_s=2.0)).degraded
            if not any(name in part and "protocol" in part for part in parts):
                return False
        return True

    try:
        await stage.until(named, JOIN_S, f"health reports name {name}")
    except DeadlineError as error:
        injection.broken.append(error.message)
    else:
        injection.proofs.append(f"{name} is refused, and every router's health says why")


async def _known(stage: Stage, name: str) -> list[ProcessStatus | None]:
    """An instance as each router sees it; None: not at all, or no answer."""
    found: list[ProcessStatus | None] = []
    for probe in stage.load.probes:
        try:
            processes = await probe.status(timeout_s=2.0)
        except XllmError:
            found.append(None)
            continue
        own = [one for one in processes if one.kind == "instance" and one.name == name]
        found.append(own[0] if own else None)
    return found
