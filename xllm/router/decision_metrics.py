"""The figures of routing and admission for /metrics: read when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm.router.admission.control import AdmissionControl
from xllm.router.placement import Placement
from xllm.router.view import ClusterView

BREAKER_STATES = ("closed", "half-open", "open")
"""The value of a breaker's gauge is the place of its state here."""


class DecisionMetrics(Collector):
    """Of one router."""

    def __init__(
        self,
        registry: CollectorRegistry,
        view: ClusterView,
        placement: Placement,
        admission: AdmissionControl,
        clock: Callable[[], float],
    ) -> None:
        self._view = view
        self._placement = placement
        self._admission = admission
        self._clock = clock
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        yield from self._routes()
        yield from self._doors()

    def _routes(self) -> Iterator[Metric]:
        routes, breakers = self._placement.figures, self._placement.breakers
        chosen = CounterMetricFamily(
            "xllm_router_routes", "Instances chosen, by what decided.", labels=["reason"]
        )
        for reason, count in routes.chosen.items():
            chosen.add_metric([reason], count)
        yield chosen
        for name, text, value in (
            ("expected_hit_blocks", "Blocks held where requests were sent.", routes.hit_blocks),
            ("prompt_blocks", "Whole blocks of prompts that were looked up.", routes.prompt_blocks),
            ("guard_yields", "Times that affinity gave way to load.", routes.num_yields),
            ("breaker_openings", "Times that a circuit breaker opened.", breakers.num_opened),
        ):
            yield CounterMetricFamily(f"xllm_router_{name}", text, value)
        state = GaugeMetricFamily(
            "xllm_router_breaker_state",
            "Circuit breaker of an instance: 0 closed, 1 half-open, 2 open.",
            labels=["target"],
        )
        now = self._clock()
        for one in self._view:
            value = BREAKER_STATES.index(breakers.state(one.name, now))
            state.add_metric([one.name], value)
        yield state

    def _doors(self) -> Iterator[Metric]:
        figures = self._admission.figures
        yield GaugeMetricFamily(
            "xllm_router_queue_length",
            "Requests that wait in the router for an instance with room.",
            self._admission.num_waiting,
        )
        yield figures.wait.family("xllm_router_queue_seconds", "Time in the router's queue.")
        rejected = CounterMetricFamily(
            "xllm_router_rejections",
            "Requests sent away: limit (of the tenant), queue (full), shed (for another), timeout.",
            labels=["reason", "tenant"],
        )
        for (reason, tenant), count in figures.rejected.items():
            rejected.add_metric([reason, tenant], count)
        yield rejected
