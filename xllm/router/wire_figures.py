"""What the router's sockets counted, as Prometheus asks for it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from xllm.protocol.transport.context import Transport


class WireFigures(Collector):
    """The counters of one transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        for name, text, value in self._transport.counts():
            yield CounterMetricFamily(name, text, value=value)
