"""Clients that are gone: what they asked for is computed for nobody, and must end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time

from xllm.cli.chaos.processes import is_alive
from xllm.cli.chaos.scenarios.raw_http import ask_http
from xllm.cli.chaos.silent_asker import ask_for_nobody
from xllm.cli.chaos.stage import Stage
from xllm.cli.chaos.verdict import Injection
from xllm.client.asynchronous import AsyncClient
from xllm.errors import DeadlineError, XllmError

NUM_DESERTED = 200
NUM_CLIENTS = 10
"""Whose streams those are."""
IDLE_S = 2.0
"""After a router's death its requests run so long, unless a client comes back for them."""
NUM_STORM = 1000
ZMQ_EVERY = 20
"""Of the clients of a storm each so-many-th speaks ZeroMQ."""
STORM_S = 5.0
FREE_S = 0.5
"""After the last client has left, its sequences run so long."""
HEARD_S = 0.5
"""And so long it takes until a router can say so: two heartbeats, and the question."""
BEGIN_S = 30.0
WAIT_S = 30.0
_LINGER_RESET = struct.pack("ii", 1, 0)


async def desert_router(stage: Stage) -> None:
    """A router is killed together with the clients of many of its streams: nobody comes back for
    them, and the instances end them."""
    victim = stage.pick("router")
    pid = victim.pid
    index = [one.name for one in stage.cluster.named("router")].index(victim.name)
    others = [one for at, one in enumerate(stage.load.probes) if at != index]
    where = stage.cluster.zmq[index]
    clients = [AsyncClient(where, discover=False) for _ in range(NUM_CLIENTS)]
    try:
        asked = [
            ask_for_nobody(clients[at % NUM_CLIENTS], at, num_tokens=4000)
            for at in range(NUM_DESERTED)
        ]
        async with asyncio.timeout(BEGIN_S):
            await asyncio.gather(*(one.begun for one in asked))
        await stage.wait_load()
        injection = stage.strike("F08", victim.name, lambda: os.kill(pid, signal.SIGKILL))
    finally:
        for one in clients:
            await one.aclose()
    await stage.prove(
        injection, f"pid {pid} is gone, with {NUM_DESERTED} streams", lambda: not is_alive(pid)
    )
    await _end_them(stage, injection, others[0] if others else stage.load.probes[0], IDLE_S)
    await stage.settle(injection)


async def disconnect_storm(stage: Stage) -> None:
    """A thousand clients ask and go away at once, over HTTP and ZeroMQ."""
    await stage.wait_load()
    injection = stage.strike("F24-storm", f"{NUM_STORM} clients", lambda: None)
    began = time.monotonic()
    guests: list[asyncio.Task[None]] = []
    num_left = 0
    for index in range(NUM_STORM):
        if index % ZMQ_EVERY == 0:
            where = stage.cluster.zmq[index // ZMQ_EVERY % len(stage.cluster.zmq)]
            guests.append(asyncio.create_task(_come_and_go(where, index)))
        else:
            one = ask_http(stage, index, num_tokens=4000)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            await asyncio.sleep(max(0.001, began + index * STORM_S / NUM_STORM - time.monotonic()))
            one.close()
        num_left += 1
    await asyncio.gather(*guests)
    injection.notes["storm_s"] = round(time.monotonic() - began, 1)
    await stage.prove(injection, f"{num_left} clients left", lambda: num_left == NUM_STORM)
    await _end_them(stage, injection, stage.load.probes[0], FREE_S)
    await stage.settle(injection)


async def _come_and_go(where: str, index: int) -> None:
    """Leave at the first token, or without one."""
    client = AsyncClient(where, discover=False)
    try:
        asked = ask_for_nobody(client, index, num_tokens=4000)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STORM_S):
                await asked.begun
    except XllmError:
        pass  # refused: it leaves all the same
    finally:
        await client.aclose()


async def _end_them(stage: Stage, injection: Injection, probe: AsyncClient, seconds: float) -> None:
    """Until the instances run what the load asks for, and no more."""
    began = injection.at if injection.scenario == "F08" else time.monotonic()
    most = stage.cluster.options.num_loops * 2  # some have two choices
    num = 0

    async def idle() -> bool:
        nonlocal num
        try:
            processes = await probe.status(timeout_s=2.0)
        except XllmError:
            return False
        found = [one for one in processes if one.kind == "instance"]
        num = sum(one.num_running + one.num_waiting for one in found)
        return bool(found) and num <= most

    try:
        await stage.until(idle, WAIT_S, "the end of what nobody reads")
    except DeadlineError:
        injection.broken.append(f"{num} sequences run after their clients left")
        return
    took_s = time.monotonic() - began
    injection.notes["slots_free_s"] = round(took_s, 2)
    if took_s > (seconds + HEARD_S) * stage.cluster.options.slack:
        injection.broken.append(f"slots were free after {took_s:.1f} s, not {seconds:g}")
