"""The one timer that says when held tokens are due, for all requests of a router."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from xllm.router.inflight import InflightRequest
from xllm.router.state.wheel import FlushWheel


class FlushTimer:
    """Calls `flush(request)` once the time of each `add` has come."""

    def __init__(
        self, clock: Callable[[], float], flush: Callable[[InflightRequest], None]
    ) -> None:
        self._clock = clock
        self._flush = flush
        self._wheel: FlushWheel[InflightRequest] = FlushWheel()
        self._handle: asyncio.TimerHandle | None = None

    def add(self, request: InflightRequest, hold_s: float) -> None:
        """The request's tokens may be held so long from now on."""
        due = self._clock() + hold_s
        next_due = self._wheel.next_due()
        self._wheel.add(request, due)
        if self._handle is None or (next_due is not None and due < next_due):
            self._arm()

    def close(self) -> None:
        """Flush nothing more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        self.close()
        due = self._wheel.next_due()
        if due is not None:
            loop = asyncio.get_running_loop()
            # uvloop's timers count whole milliseconds: rounded down they would ring too early,
            # find nothing due and be set again, over and over.
            delay_ms = math.ceil((due - self._clock()) * 1000)
            self._handle = loop.call_later(max(0, delay_ms) / 1000, self._ring)

    def _ring(self) -> None:
        self._handle = None
        for request in self._wheel.pop_due(self._clock()):
            self._flush(request)
        if self._handle is None:
            self._arm()
