"""What a router remembers of texts and prompts, as figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xllm.router.models import ServedModels


class RememberedFigures(Collector):
    """Bytes that are kept, and tokens that needed no encoding, by model."""

    def __init__(self, registry: CollectorRegistry, served: ServedModels) -> None:
        self._served = served
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        kept = GaugeMetricFamily(
            "xllm_router_remembered_bytes",
            "Encoded texts, words and block hashes that are kept.",
            labels=["model", "what"],
        )
        tokens = CounterMetricFamily(
            "xllm_router_text_tokens",
            "Tokens of texts, by whether they were encoded, put together of words, or remembered.",
            labels=["model", "how"],
        )
        for intake in self._served:
            kept.add_metric([intake.name, "hashes"], intake.block_names.kept.num_bytes)
            segments = intake.text.segments
            if segments is not None:
                kept.add_metric([intake.name, "texts"], segments.kept.num_bytes)
                num_encoded = segments.num_encoded
                if segments.words is not None:
                    kept.add_metric([intake.name, "words"], segments.words.num_bytes)
                    num_encoded = segments.words.num_encoded
                    num_put = max(0, segments.words.num_tokens - num_encoded)
                    tokens.add_metric([intake.name, "words"], num_put)
                tokens.add_metric([intake.name, "encoded"], num_encoded)
                tokens.add_metric([intake.name, "remembered"], segments.num_found)
        yield kept
        yield tokens
