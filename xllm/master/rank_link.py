"""One rank of a worker group: its connection, its process, and whether it works.

A record with two verdicts and no messages of its own: the group sends, starts and kills.
"""

from __future__ import annotations

from xllm.master.process_state import is_process_stopped
from xllm.master.vigil import WorkerVigil
from xllm.protocol.step import WorkerFailed, WorkerReady


class RankLink:
    """`identity`: of the connection whose hello was last heard; `vigil`: from when it is ready."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank = rank
        self.name = name
        self.identity: bytes | None = None
        self.vigil: WorkerVigil | None = None
        self.ready: WorkerReady | None = None
        self.failure: WorkerFailed | None = None
        self.started_at = 0.0

    def begin(self, now: float) -> None:
        """Its process was started, or is waited for, from now on."""
        self.started_at = now
        self.failure = None

    def become_ready(self, ready: WorkerReady, now: float) -> None:
        """It has loaded."""
        self.ready = ready
        self.vigil = WorkerVigil(now)

    def forget(self, now: float) -> None:
        """It is not ready any more and gets its time to become so."""
        self.vigil = None
        self.ready = None
        self.started_at = now

    def verdict(self, now: float, pid: int, start_limit_s: float) -> str:
        """What is wrong with it, or "". `pid` 0: its process is not ours."""
        if self.vigil is not None:
            reason = self.vigil.verdict(now)
            if not reason and self.vigil.is_hushed(now) and is_process_stopped(pid):
                return "its process was stopped by a signal"
            return reason
        if not pid:
            return ""
        waited_s = now - self.started_at
        return f"not ready after {waited_s:.0f} s" if waited_s > start_limit_s else ""
