"""Heartbeats of an instance: how busy it is, what its cache gained and lost, its metrics.

Invariant: every change of the cached blocks is in exactly one heartbeat, so that a router that
heard them all, or took a snapshot after a gap, knows what is cached.
"""

from __future__ import annotations

import time

from xllm.master.metrics import MasterMetrics
from xllm.master.scheduler import Scheduler
from xllm.protocol.bus import (
    BlockEvents,
    InstanceHeartbeat,
    InstanceLatency,
    InstanceLoad,
    WorkerState,
)

METRICS_PERIOD_S = 1.0


class HeartbeatMaker:
    """Makes one publisher's heartbeats; `seq` is the last one's."""

    def __init__(self, name: str, incarnation: str, metrics: MasterMetrics) -> None:
        self._name = name
        self._incarnation = incarnation
        self._metrics = metrics
        self._metrics_at = 0.0
        self._forgotten: list[BlockEvents] = []
        self.seq = 0

    def forget_blocks(self, scheduler: Scheduler) -> None:
        """A scheduler's cache is gone with its worker: the next heartbeat says so."""
        events = scheduler.drain_events()
        if events is not None:
            self._forgotten.append(events)
        self._forgotten.append(BlockEvents(removed=scheduler.snapshot_blocks()))

    def make(
        self,
        state: str,
        role: str,
        scheduler: Scheduler | None,
        worker_metrics: bytes,
        workers: tuple[WorkerState, ...] = (),
    ) -> InstanceHeartbeat:
        """The next heartbeat. `scheduler`: None while no worker is ready."""
        self.seq += 1
        events, self._forgotten = self._forgotten, []
        load, latency = InstanceLoad(), InstanceLatency()
        statistics = None
        num_cached = digest = 0
        if scheduler is not None:
            statistics = scheduler.statistics()
            load = InstanceLoad(
                num_waiting=statistics.num_waiting,
                num_running=statistics.num_running,
                num_free_blocks=statistics.num_available_blocks,
                num_blocks=statistics.num_blocks,
                waiting_tokens=statistics.waiting_tokens,
                running_tokens=statistics.running_tokens,
                num_offline=statistics.num_offline,
            )
            latency = scheduler.take_latency()
            fresh = scheduler.drain_events()
            if fresh is not None:
                events.append(fresh)
            num_cached, digest = scheduler.cached_blocks
        metrics = expert_load = b""
        now = time.monotonic()
        if now - self._metrics_at >= METRICS_PERIOD_S:
            self._metrics_at = now
            metrics = self._metrics.text(statistics) + worker_metrics
            if scheduler is not None:
                expert_load = scheduler.expert_load.report()
        return InstanceHeartbeat(
            self._name,
            self._incarnation,
            self.seq,
            state,
            role,
            load,
            latency,
            tuple(events),
            expert_load,
            metrics=metrics,
            workers=workers,
            num_cached=num_cached,
            digest=digest,
        )
