"""Figures of the router's indices of cached blocks, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm.router.kv_feed import KvFeed


class KvFeedMetrics(Collector):
    """Read when they are asked for; the feed counts."""

    def __init__(self, registry: CollectorRegistry, feed: KvFeed) -> None:
        self._feed = feed
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        yield from self._of_indices()
        feed = self._feed
        counts, promises = feed.figures, feed.promises.figures
        for name, text, value in (
            ("publishers", "Publishers that are followed.", len(feed.followers)),
            ("unknown_publishers", "Publishers that it does not know now.", feed.num_unknown),
            ("silent_instances", "Instances that tell nothing.", len(feed.silence.silent)),
        ):
            yield GaugeMetricFamily(f"xllm_kv_index_{name}", text, value)
        for name, text, value in (
            ("words", "Heartbeats heard.", counts.num_words),
            ("gaps", "Times that heartbeats were missed.", counts.num_gaps),
            ("repeated_words", "Heartbeats heard again.", counts.num_repeated),
            ("healed_gaps", "Gaps that late heartbeats closed.", counts.num_healed),
            ("snapshots_asked", "Snapshots asked for.", counts.num_asked),
            ("resyncs", "Snapshots taken over.", counts.num_resyncs),
            ("ignored_snapshots", "Snapshots that were not needed.", counts.num_ignored),
            ("digest_mismatches", "Digests that differed.", counts.num_mismatches),
            ("distrusted", "Instances that broke promises.", counts.num_distrusted),
            ("bad_events", "Events of a wrong form.", counts.num_bad),
            ("given_up", "Times that kept heartbeats were too many.", counts.num_given_up),
            ("promises", "Requests that ended where it sent them.", promises.num_promises),
            ("promised_tokens", "Tokens that it said are cached.", promises.promised_tokens),
            ("found_tokens", "Of these requests, tokens that were.", promises.found_tokens),
            ("over_tokens", "Tokens promised and not found.", promises.over_tokens),
            ("under_tokens", "Tokens found and not promised.", promises.under_tokens),
            ("broken_promises", "Promises not half kept.", promises.num_broken),
        ):
            yield CounterMetricFamily(f"xllm_kv_index_{name}", text, value)

    def _of_indices(self) -> Iterator[Metric]:
        gauges = (
            ("blocks", "Distinct blocks.", "num_keys"),
            ("entries", "Blocks by publisher and tier.", "num_entries"),
            ("bytes", "Memory.", "num_bytes"),
            ("max_bytes", "Limit of memory.", "max_bytes"),
        )
        counters = (
            ("events", "Blocks that came or went.", "num_events"),
            ("dropped_blocks", "Blocks dropped for want of room.", "num_dropped"),
            ("rebuilds", "Times that the table was renewed.", "num_rebuilt"),
        )
        counts = {model or "-": one.statistics() for model, one in self._feed.indices.items()}
        for name, text, field in gauges:
            gauge = GaugeMetricFamily(f"xllm_kv_index_{name}", text, labels=["model"])
            for model, one in counts.items():
                gauge.add_metric([model], getattr(one, field))
            yield gauge
        for name, text, field in counters:
            counter = CounterMetricFamily(f"xllm_kv_index_{name}", text, labels=["model"])
            for model, one in counts.items():
                counter.add_metric([model], getattr(one, field))
            yield counter
