"""The ranks of an instance as one group: called together, ready together, apart together.

A record of who is ready and of the steps that not all have given; sends nothing. Invariants: the
group is ready while all ranks are, and one that is lost takes the readiness of all with it; words
of an earlier meeting do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.master.rank_link import RankLink
from xllm.master.ranks import RankResults, merge_ready
from xllm.protocol.bus import WorkerState
from xllm.protocol.step import StepResult, WorkerReady


class RankMeeting:
    """`name`: of the present meeting, "" before the first and where there is one rank."""

    def __init__(self, links: Sequence[RankLink]) -> None:
        self._links = links
        self._results = RankResults(len(links))
        self.name = ""
        self.is_ready = False
        """Whether plans can be sent."""

    @property
    def is_complete(self) -> bool:
        """Whether every rank is connected."""
        return all(link.identity is not None for link in self._links)

    def link_of(self, identity: bytes) -> RankLink | None:
        """Whose connection that is; None: of nobody whose words count."""
        return next((link for link in self._links if link.identity == identity), None)

    def states(self, now: float) -> tuple[WorkerState, ...]:
        """All ranks, for heartbeats."""
        return tuple(link.state(now) for link in self._links)

    def silence_s(self, now: float) -> float:
        """How long the rank that has been silent longest has been so."""
        return max((now - link.vigil.heard_at for link in self._links if link.vigil), default=0.0)

    def shows_work(self, now: float) -> bool:
        """Whether a step is under way and pulses prove that every engine computes."""
        return self.is_ready and all(
            link.vigil is not None and link.vigil.shows_work(now) for link in self._links
        )

    def begin(self, name: str, now: float) -> None:
        """All are asked to load, or to forget, and to meet under a name that is new."""
        self.name = name if len(self._links) > 1 else ""
        self._results = RankResults(len(self._links))
        self._forget(now)

    def ready(self, link: RankLink, ready: WorkerReady, now: float) -> WorkerReady | None:
        """A rank has loaded. What the instance can do, once all have; ConfigError where they did
        not load the same thing."""
        if link.vigil is not None or ready.group != self.name:
            return None
        link.become_ready(ready, now)
        reports = [other.ready for other in self._links if other.ready is not None]
        if len(reports) < len(self._links):
            return None
        merged = merge_ready(reports)
        self.is_ready = True
        return merged

    def result(
        self, link: RankLink, result: StepResult, frames: list[bytes]
    ) -> tuple[StepResult, list[bytes]] | None:
        """A rank's result; the step's, once all have given theirs. EngineError where ranks do not
        agree."""
        if not self.is_ready:
            return None
        return self._results.add(link.rank, result, frames)

    def disband(self, now: float) -> bool:
        """No rank is ready any more; each gets its time to become so. Whether all were."""
        was_ready, self.is_ready = self.is_ready, False
        self._forget(now)
        return was_ready

    def _forget(self, now: float) -> None:
        for link in self._links:
            link.forget(now)
