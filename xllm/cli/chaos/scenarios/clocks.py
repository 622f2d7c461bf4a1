"""Clocks of the time of day that step: nothing that waits may notice."""

from __future__ import annotations

import contextlib
import functools
import json
import time

from xllm.cli.bench.http_stream import HttpAddress, HttpStreams
from xllm.cli.chaos.scenarios.alarms import Quiet
from xllm.cli.chaos.stage import Stage

STEP_S = 3600
STEPS = (STEP_S, -STEP_S, 0)
HOLD_S = 1.0
"""For so long each step lasts: several heartbeats, renewals and pings."""


async def step_wall_clocks(stage: Stage) -> None:
    """Half of the processes go an hour ahead, the others an hour back; then the other way round;
    then all are right again."""
    await stage.wait_load()
    clock = stage.around.wall_clock
    assert clock is not None
    quiet = Quiet(stage)
    injection = stage.strike("F29-step", "every process", lambda: clock.step(STEP_S))
    try:
        for step in STEPS:
            clock.step(step)
            off_by = round((await _time_of_day(stage) - time.time()) / 60)
            is_so = abs(abs(off_by) - abs(step) // 60) <= 1
            what = f"a router's clock is {off_by} minutes off"
            await stage.prove(injection, what, functools.partial(bool, is_so))
            await stage.pause(HOLD_S)
    finally:
        clock.step(0)
    quiet.check(injection)
    await stage.settle(injection)


async def _time_of_day(stage: Stage) -> int:
    """What a router writes into an answer: seconds since 1970 by its own clock."""
    streams = HttpStreams(HttpAddress.parse(stage.cluster.http))
    body = {"model": stage.load.model, "prompt": [30, 40, 50], "stream": True, "max_tokens": 1}
    events = streams.post_events("/completions", json.dumps(body).encode())
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                return int(json.loads(event)["created"])
    finally:
        streams.close()
    raise AssertionError("a stream without events")
