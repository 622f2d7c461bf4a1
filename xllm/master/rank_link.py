"""One rank of a worker group: its connection, its process, and whether it works.

A record with verdicts and no messages of its own: the group sends, starts and kills.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm.master.process_state import is_process_stopped
from xllm.master.vigil import WorkerVigil
from xllm.protocol.actor.starvation import StarvationMeter, process_meter
from xllm.protocol.bus import WorkerState
from xllm.protocol.step import WorkerFailed, WorkerReady

STOPPED = "its process was stopped by a signal"
"""The verdict on a worker that is no fault of what it runs."""


class RankLink:
    """`identity`: of the connection whose hello was last heard; `vigil`: from when it is ready.
    `make_meter`: of the process with a pid."""

    def __init__(
        self,
        rank: int,
        name: str,
        make_meter: Callable[[int], StarvationMeter] = process_meter,
    ) -> None:
        self.rank = rank
        self.name = name
        self.identity: bytes | None = None
        self.vigil: WorkerVigil | None = None
        self.ready: WorkerReady | None = None
        self.failure: WorkerFailed | None = None
        self.started_at = 0.0
        self._make_meter = make_meter
        self._meter: StarvationMeter | None = None  # while it is late
        self._metered_from = 0.0  # the last word before that

    def begin(self, now: float) -> None:
        """Its process was started, or is waited for, from now on."""
        self.started_at = now
        self.failure = None

    def become_ready(self, ready: WorkerReady, now: float) -> None:
        """It has loaded."""
        self.ready = ready
        self.vigil = WorkerVigil(now)
        self._meter = None

    def forget(self, now: float) -> None:
        """It is not ready any more and gets its time to become so."""
        self.vigil = None
        self.ready = None
        self.started_at = now

    def look(self, now: float, pid: int) -> float:
        """See whether silence is for want of CPU, if the process is ours. How long the stand or
        silence under way was denied CPU, seconds."""
        vigil = self.vigil
        if vigil is None:
            return 0.0
        if not pid or not vigil.is_late(now):
            self._meter = None
        else:
            if self._meter is None or vigil.heard_at != self._metered_from:
                self._meter, self._metered_from = self._make_meter(pid), vigil.heard_at
            self._meter.look(now)
            vigil.explain_silence(self._meter.denied_s, self._meter.num_awake)
        return vigil.denied_s

    def state(self, now: float) -> WorkerState:
        """For heartbeats."""
        if self.vigil is not None and self.ready is not None:
            silent_ms = int((now - self.vigil.heard_at) * 1000)
            return WorkerState(self.name, "ready", silent_ms, self.ready.device)
        if self.failure is not None:
            return WorkerState(self.name, "failed")
        return WorkerState(self.name, "starting" if self.identity is None else "loading")

    def verdict(self, now: float, pid: int, start_limit_s: float, denied_s: float) -> str:
        """What is wrong with it, or "". `pid` 0: its process is not ours. `denied_s`: what the
        rank that was denied most was denied, see `look`: ranks wait for each other."""
        if self.vigil is not None:
            reason = self.vigil.verdict(now, denied_s)
            if not reason and self.vigil.is_hushed(now) and is_process_stopped(pid):
                return STOPPED
            return reason
        if not pid:
            return ""
        waited_s = now - self.started_at
        return f"not ready after {waited_s:.0f} s" if waited_s > start_limit_s else ""
