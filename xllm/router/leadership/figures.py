"""Figures of a router's leadership, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm.router.leadership.office import Office
from xllm.router.leadership.standing import Standing


class LeadershipFigures(Collector):
    """Counts of one router's life; `epoch()`: 0 while it does not lead."""

    def __init__(
        self,
        registry: CollectorRegistry,
        standing: Standing,
        office: Office,
        epoch: Callable[[], int],
    ) -> None:
        self.num_terms = 0
        self.num_refused = 0
        self._standing = standing
        self._office = office
        self._epoch = epoch
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        leads = 1 if self._epoch() else 0
        yield GaugeMetricFamily("xllm_router_leads", "Whether this router leads (0 or 1).", leads)
        yield GaugeMetricFamily(
            "xllm_router_leader_epoch", "Highest epoch heard of.", self._standing.epoch
        )
        for name, text, value in (
            ("leader_terms", "Times that this router began to lead.", self.num_terms),
            ("epoch_refusals", "Commands that an instance refused as stale.", self.num_refused),
            ("stale_leader_words", "Ignored words of old leaders.", self._standing.num_stale),
            (
                "epochs_out_of_range",
                "Ignored epochs above the highest that is believed.",
                self._standing.num_out_of_range,
            ),
            ("mirror_writes", "Writes of the leader to the registry.", self._office.num_writes),
            (
                "mirror_oversized",
                "Expert-load reports too large to be mirrored.",
                self._office.mirror.num_oversized,
            ),
        ):
            yield CounterMetricFamily(f"xllm_router_{name}", text, value)
