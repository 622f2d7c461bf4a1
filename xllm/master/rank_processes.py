"""The processes of an instance's ranks that were started here: begun, killed, begun again.

Knows no messages. Its owner hears of each end and of the decision to give up.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence

import structlog

from xllm.config.load import encode_settings
from xllm.config.settings import Settings
from xllm.master.process_state import count_oom_kills, ended_by_itself
from xllm.master.rank_link import RankLink
from xllm.master.restarts import WorkerRestarts
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.children import ChildExit, Children, ChildSpec

_log = structlog.get_logger("workers")

STOP_S = 2.0
"""What a worker gets between SIGTERM and SIGKILL."""
WorkerTarget = Callable[[bytes], None]
"""First function of a worker process; injected, since masters and workers do not import each
other."""


class RankProcesses:
    """Without a target the ranks are started on their own, and nothing here does anything.
    `ended(link, exit code, by itself)` is called for each end (see process_state), `given_up(link,
    exit code, its last process's)` when no further start would help."""

    def __init__(
        self,
        actor: Actor,
        links: Sequence[RankLink],
        settings: Settings,
        target: WorkerTarget | None,
        ended: Callable[[RankLink, int, bool], None],
        given_up: Callable[[RankLink, int, int], None],
    ) -> None:
        self._actor = actor
        self._links = {link.name: link for link in links}
        self._settings = settings
        self._target = target
        self._ended = ended
        self._given_up = given_up
        self._restarts = WorkerRestarts()
        self._num_oom_kills = count_oom_kills()
        self._has_given_up = False
        self._is_excused = False
        self.was_ready = False
        self.is_ending = False
        self._children = Children(self._on_exit)

    @property
    def are_ours(self) -> bool:
        """Whether ranks are started here."""
        return self._target is not None

    @property
    def pids(self) -> dict[str, int]:
        """Pids by name."""
        return self._children.pids

    def pid(self, link: RankLink) -> int:
        """Pid of a rank's process; 0: none of ours runs."""
        return self._children.pids.get(link.name, 0)

    def ready(self) -> None:
        """All of them have loaded."""
        self.was_ready = True
        self._is_excused = False

    def excuse(self) -> None:
        """A request is the reason of what just ended one of them, or is about to."""
        self._is_excused = True

    def start(self) -> None:
        """Start the ranks that do not run."""
        now = time.monotonic()
        if self._target is None or self.is_ending:
            return
        for link in self._links.values():
            if link.name in self._children.pids:
                continue
            link.begin(now)
            worker = dataclasses.replace(self._settings.worker, rank=link.rank)
            settings = dataclasses.replace(self._settings, worker=worker)
            self._children.start(ChildSpec(link.name, self._target, (encode_settings(settings),)))

    def kill(self, link: RankLink) -> None:
        """End a rank's process at once; its end starts it again."""
        self._children.signal(link.name, signal.SIGKILL)

    def kill_unless_back(self, link: RankLink) -> None:
        """A process that lost its connection and does not come back soon is of no use."""
        if self.are_ours and link.failure is None:
            self._actor.later(STOP_S, self._kill_if_lost, link, self.pid(link))

    async def stop(self) -> None:
        """End them all, and start none again."""
        self.is_ending = True
        await self._children.stop_all(STOP_S)

    def _kill_if_lost(self, link: RankLink, pid: int) -> None:
        if pid and link.identity is None and self.pid(link) == pid:
            self.kill(link)

    def _on_exit(self, end: ChildExit) -> None:
        link = self._links[end.name]
        known, self._num_oom_kills = self._num_oom_kills, count_oom_kills()
        may_be_oom = self._num_oom_kills < 0 or self._num_oom_kills != known
        self._ended(link, end.code, ended_by_itself(end.code, may_be_oom=may_be_oom))
        if end.expected or self.is_ending or self._actor.stopping or self._has_given_up:
            return
        now = time.monotonic()
        is_excused, self._is_excused = self._is_excused, False
        delay_s = self._restarts.ended(
            end.code, now, was_ready=self.was_ready, is_excused=is_excused
        )
        if delay_s is None:
            self._has_given_up = True
            self._given_up(link, self._restarts.exit_code, end.code)
            return
        _log.warning("worker_restarts", rank=link.rank, code=end.code, delay_s=delay_s)
        self._actor.later(delay_s, self.start)
