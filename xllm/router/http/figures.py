"""The HTTP front end's own figures: integers of the loop's thread, shown when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class HttpFigures(Collector):
    """Requests by path, errors by status, open connections."""

    def __init__(self, registry: CollectorRegistry, num_connections: Callable[[], int]) -> None:
        self.num_requests: dict[str, int] = {}
        self.num_errors: dict[int, int] = {}
        self._num_connections = num_connections
        registry.register(self)

    def requested(self, path: str) -> None:
        """A request for a known path was let in."""
        self.num_requests[path] = self.num_requests.get(path, 0) + 1

    def answered_with(self, status: int) -> None:
        """A request was answered with an error, or refused before it was one."""
        self.num_errors[status] = self.num_errors.get(status, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        requests = CounterMetricFamily(
            "xllm_http_requests", "HTTP requests that were let in, by path.", labels=["path"]
        )
        for path, count in self.num_requests.items():
            requests.add_metric([path], count)
        yield requests
        errors = CounterMetricFamily(
            "xllm_http_errors", "HTTP errors, by status.", labels=["status"]
        )
        for status, count in self.num_errors.items():
            errors.add_metric([str(status)], count)
        yield errors
        yield GaugeMetricFamily(
            "xllm_http_connections", "Open HTTP connections.", self._num_connections()
        )
