"""Latencies of an instance between two heartbeats. Fed with times; knows no clock."""

from __future__ import annotations

from xllm.protocol.bus import InstanceLatency


class LatencyMeter:
    """Sums and maxima since the last `take`. A token's time is that between the ends of two
    successive steps with decodes, shared by those that one step gave a sequence."""

    __slots__ = (
        "_last_decode", "_num_first", "_num_steps", "_num_tokens", "_sum_first", "_sum_steps",
        "_sum_tokens", "_worst_first", "_worst_token",
    )  # fmt: skip

    def __init__(self) -> None:
        self._last_decode = 0.0
        self._clear()

    def _clear(self) -> None:
        self._num_first = self._num_tokens = self._num_steps = 0
        self._sum_first = self._sum_tokens = self._sum_steps = 0.0
        self._worst_first = self._worst_token = 0.0

    def note_first_token(self, seconds: float) -> None:
        """A request had its first token, so long after it was admitted."""
        self._num_first += 1
        self._sum_first += seconds
        self._worst_first = max(self._worst_first, seconds)

    def note_step(self, now: float, duration_s: float, num_decodes: int, num_more: int = 0) -> None:
        """A step ended. `num_more`: tokens that its decodes gave beyond one each."""
        self._num_steps += 1
        self._sum_steps += duration_s
        if not num_decodes:
            self._last_decode = 0.0
            return
        if self._last_decode:
            seconds = now - self._last_decode
            self._num_tokens += num_decodes + num_more
            self._sum_tokens += seconds * num_decodes
            self._worst_token = max(self._worst_token, seconds)
        self._last_decode = now

    def take(self) -> InstanceLatency:
        """The summary, and start anew."""
        summary = InstanceLatency(
            self._sum_first / self._num_first if self._num_first else 0.0,
            self._worst_first,
            self._sum_tokens / self._num_tokens if self._num_tokens else 0.0,
            self._worst_token,
            self._sum_steps / self._num_steps if self._num_steps else 0.0,
        )
        self._clear()
        return summary
