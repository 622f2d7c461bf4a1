"""The router's own figures: plain counters on the hot path, Prometheus only when asked.

prometheus_client's counters take a lock each (about a microsecond); these are integers of the
loop's thread, read by a collector when /metrics is scraped. Times are seconds.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm.protocol.generation import RequestFailed, RequestFinished

TIME_BOUNDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)


class Histogram:
    """Counts by bucket, and the sum."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(TIME_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self.counts[bisect.bisect_left(TIME_BOUNDS, value)] += 1
        self.sum += value

    def family(self, name: str, text: str) -> Metric:
        """As Prometheus has it: cumulative."""
        buckets = []
        total = 0
        for bound, count in zip((*map(str, TIME_BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(name, text)
        family.add_metric([], buckets=buckets, sum_value=self.sum)
        return family


class RouterMetrics(Collector):
    """All figures of one router's service."""

    def __init__(self, registry: CollectorRegistry, num_open: Callable[[], int]) -> None:
        self._num_open = num_open
        self.num_ended: dict[str, int] = {}
        """Requests by how they ended: `ok`, or an error's code."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.num_moves = 0
        self.num_dropped = 0
        self.num_foreign = 0
        self.registry_degraded = False
        self.num_held_back = 0
        self.num_alone = 0
        self.num_recalled = 0
        self.ttft = Histogram()
        self.duration = Histogram()
        registry.register(self)

    def ended(self, last: RequestFinished | RequestFailed, seconds: float) -> None:
        """A request gets its terminal message, so long after its submission."""
        code = "ok"
        if isinstance(last, RequestFailed):
            code = last.code
        else:
            self.prompt_tokens += last.usage.prompt_tokens
            self.completion_tokens += last.usage.completion_tokens
            self.cached_tokens += last.usage.cached_tokens
        self.num_ended[code] = self.num_ended.get(code, 0) + 1
        self.duration.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        ended = CounterMetricFamily(
            "xllm_router_requests", "Requests that ended, by how.", labels=["code"]
        )
        for code, count in self.num_ended.items():
            ended.add_metric([code], count)
        yield ended
        yield GaugeMetricFamily(
            "xllm_router_open_requests", "Requests without a terminal message.", self._num_open()
        )
        yield GaugeMetricFamily(
            "xllm_registry_degraded",
            "1: the registry does not answer, or takes no writes.",
            float(self.registry_degraded),
        )
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of finished requests.", self.prompt_tokens),
            ("completion_tokens", "New tokens of finished requests.", self.completion_tokens),
            ("cached_tokens", "Prompt tokens found cached.", self.cached_tokens),
            ("moves", "Times that a request went on elsewhere.", self.num_moves),
            ("moves_held_back", "Moves that had to wait for others.", self.num_held_back),
            ("lone_attempts", "Attempts that share no step: instances died.", self.num_alone),
            ("recalled", "Streams that went on behind tokens of an instance.", self.num_recalled),
            ("dropped_words", "Late or doubled words of instances.", self.num_dropped),
            ("foreign_words", "Words of instances on what others run.", self.num_foreign),
        ):
            yield CounterMetricFamily(f"xllm_router_{name}", text, value)
        yield self.ttft.family("xllm_router_ttft_seconds", "Submission to first token.")
        yield self.duration.family("xllm_router_request_seconds", "Submission to the end.")
