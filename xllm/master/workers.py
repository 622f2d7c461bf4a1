"""The workers of an instance: started or awaited, greeted, watched, restarted, stopped.

A shell around parts: `vigil` (does it work?), `restarts` (again, and when?), `meeting` (many as
one), `worker_losses` (what is said of an end). Tells its owner three things: ready, lost, given up;
and hands over results. Invariant: plans go only to the connections whose hello was last heard, and
only their words count.
"""

from __future__ import annotations

import dataclasses
import time
import uuid

import structlog

from xllm.config.settings import Settings
from xllm.errors import ConfigError, EngineError, TransportError
from xllm.master.meeting import RankMeeting
from xllm.master.rank_link import STOPPED, RankLink
from xllm.master.rank_processes import RankProcesses, WorkerTarget
from xllm.master.vigil import CHECK_PERIOD_S
from xllm.master.worker_losses import WorkerLosses
from xllm.master.worker_owner import WorkerOwner
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
        self._meeting = RankMeeting(self.links)
        self._losses = WorkerLosses(owner.worker_lost, actor.later)
        self.metrics = b""
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
            self._process_ended,
            self._give_up,
        )
        actor.every(CHECK_PERIOD_S, self._check)

    @property
    def is_ready(self) -> bool:
        """Whether plans can be sent."""
        return self._meeting.is_ready

    @property
    def states(self) -> tuple[WorkerState, ...]:
        """All ranks, for heartbeats."""
        return self._meeting.states(time.monotonic())

    @property
    def age_ms(self) -> int:
        """Age of the last word of the rank that has been silent longest."""
        return int(self._meeting.silence_s(time.monotonic()) * 1000)

    @property
    def pids(self) -> dict[str, int]:
        """Pids of the workers that were started here."""
        return self._processes.pids

    def excuse(self) -> None:
        """A request is the reason of the loss that the owner is just told of."""
        self._processes.excuse()

    def start(self) -> None:
        """Start the workers, or wait for those that are started on their own."""
        self._processes.start()

    @property
    def shows_work(self) -> bool:
        """Whether a step is under way and pulses prove that every engine computes."""
        return self._meeting.shows_work(time.monotonic())

    def send_plan(self, plan: StepPlan) -> None:
        """Send a plan to the ready workers; one that cannot be reached is lost."""
        now = time.monotonic()
        for link in self.links:
            if not self.is_ready:
                return  # a rank before this one was lost with the sending
            assert link.vigil is not None
            link.vigil.sent(plan, now)
            self._send(link, plan)
        self._socket.flush()  # the next plan is made in this turn of the loop

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
        self._losses.close()
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
        link = self._meeting.link_of(identity)
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
            self._pass_on(link, message)
        elif isinstance(message, WorkerPong):
            self._owner.worker_pong(message.nonce)
        elif isinstance(message, ModelAwake) and link.rank == 0:
            self._owner.model_awake(message)

    def _greet(self, identity: bytes, hello: WorkerHello) -> None:
        if not 0 <= hello.rank < len(self.links):
            _log.error("worker_refused", rank=hello.rank, num_workers=len(self.links))
            return
        link = self.links[hello.rank]
        if not self._may_be(link, identity):
            self._refuse(hello.rank, "another key has that rank")
            self._stop(identity)
            return
        if link.identity is not None:
            self._lose(link, "another connection of a worker replaced it")
            self._losses.settle()
        _log.info("worker_hello", rank=hello.rank, pid=hello.pid, device=hello.device)
        link.identity = identity
        # A worker that had run plans of an earlier master or connection loads anew, and so
        # forgets their sequences, before it sees a plan of ours; others just say ready.
        self._call_together()

    def _may_be(self, link: RankLink, identity: bytes) -> bool:
        """Whether the key of a connection may be that rank: ours, where we start the workers, and
        else that of the rank's connection, while it has one. (Without keys everybody may.)"""
        peer = self._socket.peer(identity)
        if peer is None:
            return True
        if self._processes.are_ours:
            return peer.public_key == self._actor.transport.public_key
        present = None if link.identity is None else self._socket.peer(link.identity)
        return present is None or present.public_key == peer.public_key

    def _refuse(self, rank: int, reason: str) -> None:
        self._actor.transport.num_refused += 1
        _log.error("worker_refused", rank=rank, reason=reason)

    def _stop(self, identity: bytes) -> None:
        """It ends itself, and whoever started it starts it again."""
        try:
            self._socket.send(identity, StopWorker())
        except TransportError:
            pass  # it is gone

    def _call_together(self) -> None:
        """Once every rank is here, all load (or forget) and meet under a new name."""
        if not self._meeting.is_complete:
            return
        self._meeting.begin(uuid.uuid4().hex, time.monotonic())
        for link in tuple(self.links):
            self._send(link, LoadModel(self._settings.model.name, self._meeting.name))

    def _pass_on(self, sender: RankLink, notice: RankNotice) -> None:
        """What one rank tells the others of itself; nothing of a meeting that is over."""
        if notice.rank != sender.rank:
            self._refuse(notice.rank, f"rank {sender.rank} speaks for it")
        elif notice.group == self._meeting.name:
            for link in [link for link in self.links if link.rank != notice.rank]:
                self._send(link, notice)

    def _take_result(
        self, link: RankLink, result: StepResult, frames: list[bytes], now: float
    ) -> None:
        if link.vigil is not None:
            link.vigil.result(result.duration_ns / 1e9, now)
        try:
            merged = self._meeting.result(link, result, frames)
        except EngineError as error:
            self._regroup(link, error.message)
            return
        if merged is not None:
            self._owner.worker_result(*merged)

    def _ready(self, link: RankLink, ready: WorkerReady, now: float) -> None:
        try:
            merged = self._meeting.ready(link, ready, now)
        except ConfigError as error:
            self._owner.worker_given_up(error.exit_code, error.code, error.message)
            return
        if merged is not None:
            self._processes.ready()
            self._owner.worker_ready(merged)

    def _failed(self, link: RankLink, message: WorkerFailed, now: float) -> None:
        if message.step < 0:
            link.failure = message
            self._lose(link, f"the worker could not load: {message.message}", by_itself=True)
        elif len(self.links) > 1:
            self._regroup(link, f"step {message.step} failed there: {message.message}")
        else:
            if link.vigil is not None:
                link.vigil.result(0.0, now)
            self._owner.worker_failed_step(message)

    def _on_gone(self, identity: bytes) -> None:
        link = self._meeting.link_of(identity)
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
            self._lose(link, reason, by_itself=reason != STOPPED)
            link.started_at = now
            self._processes.kill(link)

    def _process_ended(self, link: RankLink, code: int, by_itself: bool) -> None:
        """A process of ours ended."""
        reason = f"its process ended with {code}"
        self._losses.process_ended(link.rank, reason, by_itself=by_itself)
        self._lose(link, reason, by_itself=by_itself)

    def _lose(self, link: RankLink, reason: str, *, by_itself: bool | None = None) -> None:
        """A connection is given up; a process of ours is ended, and its end restarts it. The
        other ranks stay, with what they have loaded, and meet again when it is back. `by_itself`:
        see WorkerOwner; None: the end of its process will tell."""
        if link.identity is None and link.vigil is None:
            return
        link.identity = None
        was_ready = self._meeting.disband(time.monotonic())
        if self._processes.is_ending:
            return
        _log.warning("worker_lost", rank=link.rank, reason=reason)
        self._processes.kill_unless_back(link)
        if not was_ready:
            return
        if by_itself is None and self._processes.pid(link):
            self._losses.lost_connection(link.rank, reason)
        else:
            self._losses.lost(reason, by_itself=by_itself is not False)

    def _regroup(self, link: RankLink, reason: str) -> None:
        """All ranks live, but one stands elsewhere than the others, who may wait for it in the
        middle of a layer: leaving the old group frees them."""
        if self._meeting.disband(time.monotonic()):
            _log.warning("ranks_meet_anew", rank=link.rank, reason=reason)
            self._losses.lost(reason, by_itself=True)
            self._call_together()

    def _give_up(self, link: RankLink, exit_code: int, ended_with: int) -> None:
        failure = link.failure
        code = failure.code if failure else "internal_error"
        text = failure.message if failure else f"the worker ended with exit code {ended_with}"
        self._owner.worker_given_up(exit_code, code, text)
