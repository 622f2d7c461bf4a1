"""A master's Prometheus metrics: counted plainly, turned into text when asked for.

Its own registry, no globals. Names carry no instance: the router that serves them labels them.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from xllm.master.outcome import StepOutcome
from xllm.master.scheduler import SchedulerStatistics


class MasterMetrics:
    """Counts since the start of the process, and the last statistics of the scheduler."""

    def __init__(self) -> None:
        self.num_admitted = 0
        self.num_refused = 0
        self.num_ended = 0
        self.num_failed = 0
        self.num_steps = 0
        self.num_tokens = 0
        self.num_vectors = 0
        self.num_cached_tokens = 0
        self.num_worker_ends = 0
        self.num_stale_commands = 0
        self.num_epochs_out_of_range = 0
        self._statistics: SchedulerStatistics | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def note_outcome(self, outcome: StepOutcome) -> None:
        """Count what goes to the routers."""
        self.num_tokens += len(outcome.items)
        self.num_vectors += len(outcome.vectors)
        for ended in outcome.ended:
            if ended.code:
                self.num_failed += 1
            else:
                self.num_ended += 1
                self.num_cached_tokens += ended.cached_tokens

    def text(self, statistics: SchedulerStatistics | None) -> bytes:
        """Prometheus text format."""
        self._statistics = statistics
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        counters: tuple[tuple[str, str, float], ...] = (
            ("admitted", "Requests taken in.", self.num_admitted),
            ("refused", "Requests refused at admission.", self.num_refused),
            ("ended", "Requests that ended as asked.", self.num_ended),
            ("failed", "Requests that ended with an error.", self.num_failed),
            ("steps", "Steps settled.", self.num_steps),
            ("tokens", "Token items sent to routers.", self.num_tokens),
            ("vectors", "Vectors sent to routers.", self.num_vectors),
            ("cached_prompt_tokens", "Prompt tokens found cached.", self.num_cached_tokens),
            ("worker_ends", "Workers lost.", self.num_worker_ends),
            ("stale_commands", "Commands of replaced leaders, refused.", self.num_stale_commands),
            (
                "epochs_out_of_range",
                "Commands under epochs above 2^62 - 1 that the registry did not confirm.",
                self.num_epochs_out_of_range,
            ),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(f"xllm_master_{name}", text, value=value)
        stats = self._statistics
        if stats is None:
            return
        gauges: tuple[tuple[str, str, float], ...] = (
            ("waiting_sequences", "Sequences that wait.", stats.num_waiting),
            ("running_sequences", "Sequences that run.", stats.num_running),
            ("paused_sequences", "Sequences that keep their KV off the steps.", stats.num_paused),
            ("blocks", "KV blocks.", stats.num_blocks),
            ("available_blocks", "KV blocks free or reusable.", stats.num_available_blocks),
            ("cached_blocks", "KV blocks in the prefix cache.", stats.num_cached_blocks),
            ("waiting_tokens", "Tokens still to be computed.", stats.waiting_tokens),
            ("preemptions", "Preemptions of this worker's life.", stats.num_preemptions),
            ("pauses", "Pauses of this worker's life.", stats.num_pauses),
            ("drafts", "Guessed tokens verified, this worker's life.", stats.num_drafts),
            (
                "accepted_drafts",
                "Of these, equal to what was drawn.",
                stats.num_accepted_drafts,
            ),
            ("evictions", "Evicted blocks of this worker's life.", stats.num_evictions),
            ("worker_busy_seconds", "Time in steps of this worker's life.", stats.worker_busy_s),
            (
                "worker_idle_seconds",
                "Time between steps while there was work, of this worker's life.",
                stats.worker_idle_s,
            ),
        )
        if stats.slots is not None:
            slots = stats.slots
            gauges += (
                ("slots_used", "Slots with a sequence.", slots.num_used),
                ("mappings", "Mappings of KV pages under slots.", slots.num_mappings),
                ("max_mappings", "Mappings that the worker may have.", slots.max_mappings),
                ("slot_pages", "Pages given to slots, this worker's life.", slots.num_pages),
                ("slot_pages_found", "Of these, mapped there already.", slots.num_pages_found),
            )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"xllm_master_{name}", text, value=value)
