"""Clients that misbehave: mute and slow ones; and what that may cost the others."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import time

from xllm.cli.chaos.processes import cpu_seconds, size_of, start_child, state_of
from xllm.cli.chaos.scenarios.raw_http import ask_http
from xllm.cli.chaos.stage import Stage
from xllm.cli.chaos.stalled_clients import STALLED
from xllm.cli.chaos.verdict import Injection
from xllm.errors import DeadlineError

NUM_SLOW = 50
NUM_MUTE = 120
MEMORY_MB = 64
GROWTH_S = 3.0
STALL_S = 60.0
SERVED_S = 1.5
"""What a client may wait while the router is out of descriptors."""


async def slow_readers(stage: Stage) -> None:
    """Clients that ask for streams over HTTP and read nothing of them."""
    await stage.wait_load()
    before = _sizes(stage)
    opened: list[socket.socket] = []
    injection = stage.strike("F24-slow", f"{NUM_SLOW} clients", lambda: None)
    try:
        opened += [ask_http(stage, index, num_tokens=1000) for index in range(NUM_SLOW)]
        await stage.prove(injection, f"{NUM_SLOW} of them wait", lambda: len(opened) == NUM_SLOW)
        await _watch_growth(stage, injection, before)
    finally:
        for one in opened:
            one.close()
    await stage.settle(injection)


async def stalled_readers(stage: Stage) -> None:
    """Clients that ask for streams over ZeroMQ and read nothing of them, though their connections
    live: ZeroMQ's threads answer pings."""
    before = _sizes(stage)
    shown = stage.cluster.directory / "stalled.out"
    shown.unlink(missing_ok=True)
    command = [sys.executable, "-m", "xllm.cli.chaos.stalled_clients", stage.cluster.zmq[0]]
    process = start_child([*command, str(NUM_SLOW), "4000"], shown)
    try:
        await stage.cluster.until(
            lambda: STALLED in shown.read_text(errors="replace"), STALL_S, "clients that stall"
        )
        await stage.wait_load()
        injection = stage.strike("F24-stall", f"{NUM_SLOW} clients", lambda: None)
        await stage.prove(
            injection, f"pid {process.pid} sleeps in its loop", lambda: state_of(process.pid) == "S"
        )
        await _watch_growth(stage, injection, before)
    finally:
        process.kill()
        process.wait()
    await stage.settle(injection)


async def exhaust_descriptors(stage: Stage) -> None:
    """Mute connections take a router's last descriptors; other clients go on, and it recovers."""
    await stage.wait_load()
    victim = stage.cluster.named("router")[0]
    size = size_of(victim.pid)
    assert size is not None
    old = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
    mute: list[socket.socket] = []
    injection = stage.strike("F27", victim.name, lambda: None)
    try:
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (size.num_fds + NUM_MUTE // 2, old[1]))
        for _ in range(NUM_MUTE):
            with contextlib.suppress(OSError):
                mute.append(_connect(stage.http_port))
        await stage.prove(
            injection, f"{len(mute)} mute connections for {NUM_MUTE // 2} descriptors",
            lambda: len(mute) > NUM_MUTE // 2,
        )  # fmt: skip
        await stage.pause(SERVED_S * 2)
        await _served(stage, injection.broken)
    finally:
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, old)
        for one in mute:
            one.close()
    cpu = cpu_seconds(victim.pid)
    await stage.pause(1.0)
    injection.notes["cpu_share_after"] = round(cpu_seconds(victim.pid) - cpu, 2)
    await stage.settle(injection)


async def _watch_growth(stage: Stage, injection: Injection, before: dict[str, int]) -> None:
    await stage.pause(GROWTH_S)
    after = _sizes(stage)
    grown = max(after[name] - size for name, size in before.items()) / 1024
    injection.notes["grown_mb"] = round(grown, 1)
    if grown > MEMORY_MB:
        injection.broken.append(f"a router grew by {grown:.0f} MB, not at most {MEMORY_MB}")


def _sizes(stage: Stage) -> dict[str, int]:
    """Resident kilobytes of each router."""
    return {one.name: _rss_kb(one.pid) for one in stage.cluster.named("router")}


async def _served(stage: Stage, broken: list[str]) -> None:
    began = time.monotonic()
    try:
        await stage.load.probes[0].health(timeout_s=10 * SERVED_S)
    except DeadlineError:
        broken.append("nobody was answered while descriptors were short")
        return
    took_s = time.monotonic() - began
    if took_s > SERVED_S:
        broken.append(f"a client waited {took_s:.1f} s, not at most {SERVED_S:g}")


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=2.0)


def _rss_kb(pid: int) -> int:
    size = size_of(pid)
    return size.rss_kb if size is not None else 0
