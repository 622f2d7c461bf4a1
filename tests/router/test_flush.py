"""The one timer of held tokens: it rings about once for each time that something is due."""

from __future__ import annotations

import asyncio
import time

import uvloop

from xllm.router.flush import FlushTimer
from xllm.router.inflight import InflightRequest


class CountingTimer(FlushTimer):
    """Counts how often it rings."""

    num_rings = 0

    def _ring(self) -> None:
        self.num_rings += 1
        super()._ring()


def test_it_does_not_ring_before_anything_is_due():
    async def main() -> None:
        flushed = asyncio.Event()
        timer = CountingTimer(time.monotonic, lambda request: flushed.set())
        for number in range(60):
            flushed.clear()
            timer.add(InflightRequest(number, None, 0.0, 0.0), 0.0201 + 0.0003 * (number % 7))
            await asyncio.wait_for(flushed.wait(), 5)
        assert timer.num_rings <= 70
        timer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
