"""Clients that misbehave: mute, slow, gone; and what that may cost the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import struct
import time

from xllm.cli.chaos.processes import cpu_seconds, size_of
from xllm.cli.chaos.stage import Stage
from xllm.errors import DeadlineError

NUM_SLOW = 50
NUM_STORM = 200
NUM_MUTE = 120
MEMORY_MB = 64
LOOK_S = 0.1
NUM_LOOKS = 20
"""After the storm, for what it asked for to be gone."""
SERVED_S = 1.5
"""What a client may wait while the router is out of descriptors."""
_LINGER_RESET = struct.pack("ii", 1, 0)


async def slow_readers(stage: Stage) -> None:
    """Clients that ask for streams over HTTP and read nothing of them."""
    await stage.wait_load()
    routers = stage.cluster.named("router")
    before = {one.name: _rss_kb(one.pid) for one in routers}
    opened: list[socket.socket] = []
    injection = stage.strike("F24-slow", f"{NUM_SLOW} clients", lambda: None)
    try:
        opened += [_ask_http(stage, index, num_tokens=1000) for index in range(NUM_SLOW)]
        await stage.prove(injection, f"{NUM_SLOW} of them wait", lambda: len(opened) == NUM_SLOW)
        await stage.pause(3.0)
        grown = max(_rss_kb(one.pid) - before[one.name] for one in routers) / 1024
        injection.notes["grown_mb"] = round(grown, 1)
        if grown > MEMORY_MB:
            injection.broken.append(f"a router grew by {grown:.0f} MB, not at most {MEMORY_MB}")
    finally:
        for one in opened:
            one.close()
    await stage.settle(injection)


async def disconnect_storm(stage: Stage) -> None:
    """Clients that ask and go away at once: what they asked for is computed for nobody."""
    await stage.wait_load()
    injection = stage.strike("F24-storm", f"{NUM_STORM} clients", lambda: None)
    began = time.monotonic()
    for index in range(NUM_STORM):
        one = _ask_http(stage, index, num_tokens=4000)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        await asyncio.sleep(0.005)
        one.close()
    await stage.prove(injection, f"{NUM_STORM} clients left", lambda: True)
    own = stage.cluster.options.num_loops * 2

    async def num_running() -> int:
        processes = await stage.load.probes[0].status(timeout_s=5.0)
        return sum(one.num_running + one.num_waiting for one in processes
                   if one.kind == "instance")  # fmt: skip

    injection.notes["storm_s"] = round(time.monotonic() - began, 1)
    num = 0
    for waited in range(NUM_LOOKS):
        num = await num_running()
        if num <= own:
            injection.notes["slots_free_s"] = round(waited * LOOK_S, 2)
            break
        await asyncio.sleep(LOOK_S)
    else:
        injection.broken.append(f"{num} sequences run after their clients left")
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


def _ask_http(stage: Stage, index: int, num_tokens: int) -> socket.socket:
    """A connection over which a stream was asked for, and that is not read."""
    body = json.dumps({
        "model": stage.load.model, "prompt": [20 + index % 200, 30, 40], "stream": True,
        "max_tokens": num_tokens, "ignore_eos": True,
    }).encode()  # fmt: skip
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", stage.http_port))
    one.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return one


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=2.0)


def _rss_kb(pid: int) -> int:
    size = size_of(pid)
    return size.rss_kb if size is not None else 0
