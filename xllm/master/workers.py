"""The workers of an instance: started or awaited, greeted, watched, restarted, stopped.

A shell around pure parts: `vigil` (does it work?), `restarts` (again, and when?), `ranks` (many
as one). Tells its owner three things: ready, lost, given up; and hands over results. Invariants:
plans go only to the connections whose hello was last heard, and only their words count; the group
is ready while all ranks are, and one that is lost takes the readiness of all with it.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Protocol

import structlog

from xllm.config.settings import Settings
from xllm.errors import ConfigError, EngineError, TransportError
from xllm.master.rank_link import RankLink
from xllm.master.rank_processes import RankProcesses, WorkerTarget
from xllm.master.ranks import RankResults, merge_ready
from xllm.protocol.actor.base import Actor
from xllm.protocol.bus import WorkerState
from xllm.protocol.codec import Decoder
from xllm.protocol.step import (
    LoadModel,
    MasterMessage,
    ModelAwake,
    PingWorker,
    RankNotice,
    SleepModel,
    StepPlan,
    StepResult,
    StopWorker,
    WakeModel,
    WorkerFailed,
    WorkerHello,
    WorkerMessage,
    WorkerPong,
    WorkerPulse,
    WorkerReady,
)
from xllm.protocol.transport.router import RouterSocket

_log = structlog.get_logger("workers")

CHECK_PERIOD_S = 0.25


class WorkerOwner(Protocol):
    """What the master hears of its workers."""

    def worker_ready(self, ready: WorkerReady) -> None:
        """A worker has loaded and knows no sequence."""

    def worker_lost(self, reason: str) -> None:
        """It is gone, and with it all KV and the step in flight."""

    def worker_result(self, result: StepResult, frames: list[bytes]) -> None:
        """A step came back."""

    def worker_failed_step(self, message: WorkerFailed) -> None:
        """A step failed; the worker goes on without its sequences."""

    def model_awake(self, message: ModelAwake) -> None:
        """A model that slept takes plans again, or cannot."""

    def worker_pong(self, nonce: int) -> None:
        """The engine thread answered a ping."""

    def worker_given_up(self, exit_code: int, code: str, reason: str) -> None:
        """No worker will come back."""


class WorkerGroup:
    """Lives inside the master's actor, which lends its timers."""

    def __init__(
        self,
        actor: Actor,
        owner: WorkerOwner,
        settings: Settings,
        endpoint: str,
        target: WorkerTarget | None,
    ) -> None:
        self._actor = actor
        self._owner = owner
        self._settings = settings
        num_ranks = settings.master.num_workers
        self.links = [RankLink(rank, f"{actor.name}/worker-{rank}") for rank in range(num_ranks)]
        self._results = RankResults(num_ranks)
        self._group = ""
        self._is_ready = False
        self.metrics = b""
        self.num_ends = 0
        self._socket = RouterSocket(
            actor.transport,
            endpoint,
            Decoder[WorkerMessage](WorkerMessage),
            self._on_message,
            on_gone=self._on_gone,
            name="workers",
        )
        self.endpoint = self._socket.endpoint
        master = dataclasses.replace(settings.master, worker_endpoint=self.endpoint)
        self._processes = RankProcesses(
            actor,
            self.links,
            dataclasses.replace(settings, master=master),
            target,
            self._lose,
            self._give_up,
        )
        actor.every(CHECK_PERIOD_S, self._check)

    @property
    def is_ready(self) -> bool:
        """Whether plans can be sent."""
        return self._is_ready

    @property
    def states(self) -> tuple[WorkerState, ...]:
        """All ranks, for heartbeats."""
        now = time.monotonic()
        return tuple(link.state(now) for link in self.links)

    @property
    def age_ms(self) -> int:
        """Age of the last word of the rank that has been silent longest."""
        heard = [link.vigil.heard_at for link in self.links if link.vigil is not None]
        return int((time.monotonic() - min(heard)) * 1000) if heard else 0

    @property
    def pids(self) -> dict[str, int]:
        """Pids of the workers that were started here."""
        return self._processes.pids

    def start(self) -> None:
        """Start the workers, or wait for those that are started on their own."""
        self._processes.start()

    @property
    def shows_work(self) -> bool:
        """Whether a step is under way and pulses prove that every engine computes."""
        now = time.monotonic()
        return self._is_ready and all(
            link.vigil is not None and link.vigil.shows_work(now) for link in self.links
        )

    def send_plan(self, plan: StepPlan) -> None:
        """Send a plan to the ready workers; one that cannot be reached is lost."""
        now = time.monotonic()
        for link in self.links:
            if not self._is_ready:
                return  # a rank before this one was lost with the sending
            assert link.vigil is not None
            link.vigil.sent(plan, now)
            self._send(link, plan)

    def tell(self, message: SleepModel | WakeModel) -> None:
        """Put a model to sleep, or wake it."""
        for link in tuple(self.links):
            self._send(link, message)

    def ping(self, nonce: int) -> None:
        """Ask the engine thread of rank 0 for a pong."""
        self._send(self.links[0], PingWorker(nonce))

    async def stop(self) -> None:
        """End the workers that were started here and close the socket."""
        await self._processes.stop()
        self._socket.close()

    def _send(self, link: RankLink, message: MasterMessage) -> None:
        if link.identity is None:
            return
        try:
            self._socket.send(link.identity, message)
        except TransportError as error:
            self._lose(link, f"the worker takes no messages: {error.message}")

    # -- from the workers --------------------------------------------------------------------

    def _on_message(self, identity: bytes, message: WorkerMessage, frames: list[bytes]) -> None:
        if isinstance(message, WorkerHello):
            self._greet(identity, message)
            return
        link = self._link_of(identity)
        if link is None:
            return
        now = time.monotonic()
        if isinstance(message, StepResult):
            self._take_result(link, message, frames, now)
        elif isinstance(message, WorkerPulse):
            if message.metrics and link.rank == 0:
                self.metrics = message.metrics
            if link.vigil is not None:
                link.vigil.pulse(message.counter, message.busy, now, message.denied_s)
        elif isinstance(message, WorkerReady):
            self._ready(link, message, now)
        elif isinstance(message, WorkerFailed):
            self._failed(link, message, now)
        elif isinstance(message, RankNotice):
            self._pass_on(message)
        elif isinstance(message, WorkerPong):
            self._owner.worker_pong(message.nonce)
        elif isinstance(message, ModelAwake) and link.rank == 0:
            self._owner.model_awake(message)

    def _link_of(self, identity: bytes) -> RankLink | None:
        return next((link for link in self.links if link.identity == identity), None)

    def _greet(self, identity: bytes, hello: WorkerHello) -> None:
        if not 0 <= hello.rank < len(self.links):
            _log.error("worker_refused", rank=hello.rank, num_workers=len(self.links))
            return
        link = self.links[hello.rank]
        if link.identity is not None:
            self._lose(link, "another connection of a worker replaced it")
        _log.info("worker_hello", rank=hello.rank, pid=hello.pid, device=hello.device)
        link.identity = identity
        # A worker that had run plans of an earlier master or connection loads anew, and so
        # forgets their sequences, before it sees a plan of ours; others just say ready.
        self._call_together()

    def _call_together(self) -> None:
        """Once every rank is here, all load (or forget) and meet under a new name."""
        if any(link.identity is None for link in self.links):
            return
        self._group = uuid.uuid4().hex if len(self.links) > 1 else ""
        self._results = RankResults(len(self.links))
        now = time.monotonic()
        for link in tuple(self.links):
            link.forget(now)
            self._send(link, LoadModel(self._settings.model.name, self._group))

    def _pass_on(self, notice: RankNotice) -> None:
        """What one rank tells the others; nothing of a meeting that is over."""
        if notice.group != self._group:
            return
        for link in self.links:
            if link.rank != notice.rank:
                self._send(link, notice)

    def _take_result(
        self, link: RankLink, result: StepResult, frames: list[bytes], now: float
    ) -> None:
        if link.vigil is not None:
            link.vigil.result(result.duration_ns / 1e9, now)
        if not self._is_ready:
            return
        try:
            merged = self._results.add(link.rank, result, frames)
        except EngineError as error:
            self._regroup(link, error.message)
            return
        if merged is not None:
            self._owner.worker_result(*merged)

    def _ready(self, link: RankLink, ready: WorkerReady, now: float) -> None:
        if link.vigil is not None or ready.group != self._group:
            return
        link.become_ready(ready, now)
        reports = [other.ready for other in self.links if other.ready is not None]
        if len(reports) < len(self.links):
            return
        try:
            merged = merge_ready(reports)
        except ConfigError as error:
            self._owner.worker_given_up(error.exit_code, error.code, error.message)
            return
        self._is_ready = self._processes.was_ready = True
        self._owner.worker_ready(merged)

    def _failed(self, link: RankLink, message: WorkerFailed, now: float) -> None:
        if message.step < 0:
            link.failure = message
            self._lose(link, f"the worker could not load: {message.message}")
        elif len(self.links) > 1:
            self._regroup(link, f"step {message.step} failed there: {message.message}")
        else:
            if link.vigil is not None:
                link.vigil.result(0.0, now)
            self._owner.worker_failed_step(message)

    def _on_gone(self, identity: bytes) -> None:
        link = self._link_of(identity)
        if link is not None:
            self._lose(link, "the connection to the worker is lost")

    # -- their end ---------------------------------------------------------------------------

    def _check(self) -> None:
        now = time.monotonic()
        limit_s = self._settings.master.worker_start_s
        denied_s = max(link.look(now, self._processes.pid(link)) for link in self.links)
        for link in self.links:
            reason = link.verdict(now, self._processes.pid(link), limit_s, denied_s)
            if not reason:
                continue
            if not self._processes.are_ours:
                # Not ours to kill: it ends itself, and whoever started it starts it again.
                self._send(link, StopWorker())
            self._lose(link, reason)
            link.started_at = now
            self._processes.kill(link)

    def _lose(self, link: RankLink, reason: str) -> None:
        """A connection is given up; a process of ours is ended, and its end restarts it. The
        other ranks stay, with what they have loaded, and meet again when it is back."""
        if link.identity is None and link.vigil is None:
            return
        link.identity = None
        was_ready = self._disband()
        if self._processes.is_ending:
            return
        _log.warning("worker_lost", rank=link.rank, reason=reason)
        self._processes.kill_unless_back(link)
        if was_ready:
            self.num_ends += 1
            self._owner.worker_lost(reason)

    def _regroup(self, link: RankLink, reason: str) -> None:
        """All ranks live, but one stands elsewhere than the others, who may wait for it in the
        middle of a layer: leaving the old group frees them."""
        if self._disband():
            _log.warning("ranks_meet_anew", rank=link.rank, reason=reason)
            self._owner.worker_lost(reason)
            self._call_together()

    def _disband(self) -> bool:
        """No rank is ready any more; each gets its time to become so. Whether all were."""
        was_ready, self._is_ready = self._is_ready, False
        now = time.monotonic()
        for link in self.links:
            link.forget(now)
        return was_ready

    def _give_up(self, link: RankLink, exit_code: int, ended_with: int) -> None:
        failure = link.failure
        code = failure.code if failure else "internal_error"
        text = failure.message if failure else f"the worker ended with exit code {ended_with}"
        self._owner.worker_given_up(exit_code, code, text)
