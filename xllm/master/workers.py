"""The workers of an instance: started or awaited, greeted, watched, restarted, stopped.

A shell around two pure parts: `vigil` (does it work?) and `restarts` (again, and when?). Tells
its owner three things: ready, lost, given up; and hands over results. One rank today. Invariant:
plans go only to the connection whose hello was last heard, and only that connection's words count.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from xllm.config.load import encode_settings
from xllm.config.settings import Settings
from xllm.errors import TransportError
from xllm.master.process_state import is_process_stopped
from xllm.master.restarts import WorkerRestarts
from xllm.master.vigil import WorkerVigil
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.children import ChildExit, Children, ChildSpec
from xllm.protocol.codec import Decoder
from xllm.protocol.step import (
    LoadModel,
    MasterMessage,
    PingWorker,
    StepPlan,
    StepResult,
    StopWorker,
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
STOP_S = 2.0
"""What a worker gets between SIGTERM and SIGKILL."""
WorkerTarget = Callable[[bytes], None]
"""First function of a worker process; injected, since masters and workers do not import each
other."""


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
        self._target = target
        self._restarts = WorkerRestarts()
        self._identity: bytes | None = None
        self._vigil: WorkerVigil | None = None
        self._was_ready = False
        self._ending = False
        self._started_at = 0.0
        self._failure: WorkerFailed | None = None
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
        self._children = Children(self._on_exit)
        actor.every(CHECK_PERIOD_S, self._check)

    @property
    def is_ready(self) -> bool:
        """Whether plans can be sent."""
        return self._vigil is not None

    @property
    def age_ms(self) -> int:
        """Age of the worker's last word."""
        return int((time.monotonic() - self._vigil.heard_at) * 1000) if self._vigil else 0

    @property
    def pids(self) -> dict[str, int]:
        """Pids of the workers that were started here."""
        return self._children.pids

    def start(self) -> None:
        """Start the worker, or wait for one that is started on its own."""
        self._started_at = time.monotonic()
        if self._target is None or self._ending:
            return
        master = dataclasses.replace(self._settings.master, worker_endpoint=self.endpoint)
        settings = dataclasses.replace(self._settings, master=master)
        self._failure = None
        self._children.start(ChildSpec(self._name, self._target, (encode_settings(settings),)))

    @property
    def shows_work(self) -> bool:
        """Whether a step is under way and pulses prove that the engine computes."""
        return self._vigil is not None and self._vigil.shows_work(time.monotonic())

    def send_plan(self, plan: StepPlan) -> None:
        """Send a plan to the ready worker; one that cannot be reached is lost."""
        assert self._vigil is not None
        self._vigil.sent(plan, time.monotonic())
        self._send(plan)

    def ping(self, nonce: int) -> None:
        """Ask the engine thread for a pong."""
        self._send(PingWorker(nonce))

    async def stop(self) -> None:
        """End the workers that were started here and close the socket."""
        self._ending = True
        await self._children.stop_all(STOP_S)
        self._socket.close()

    @property
    def _pid(self) -> int:
        """Pid of the worker that was started here; 0: none."""
        return self._children.pids.get(self._name, 0)

    @property
    def _name(self) -> str:
        return f"{self._actor.name}/worker-0"

    def _send(self, message: MasterMessage) -> None:
        if self._identity is None:
            return
        try:
            self._socket.send(self._identity, message)
        except TransportError as error:
            self._lose(f"the worker takes no messages: {error.message}")

    # -- from the worker ---------------------------------------------------------------------

    def _on_message(self, identity: bytes, message: WorkerMessage, frames: list[bytes]) -> None:
        if isinstance(message, WorkerHello):
            self._greet(identity, message)
            return
        if identity != self._identity:
            return
        now = time.monotonic()
        if isinstance(message, StepResult):
            if self._vigil is not None:
                self._vigil.result(message.duration_ns / 1e9, now)
            self._owner.worker_result(message, frames)
        elif isinstance(message, WorkerPulse):
            if message.metrics:
                self.metrics = message.metrics
            if self._vigil is not None:
                self._vigil.pulse(message.counter, message.busy, now)
        elif isinstance(message, WorkerReady):
            self._ready(message, now)
        elif isinstance(message, WorkerFailed):
            self._failed(message, now)
        elif isinstance(message, WorkerPong):
            self._owner.worker_pong(message.nonce)

    def _greet(self, identity: bytes, hello: WorkerHello) -> None:
        if self._identity is not None:
            self._lose("another connection of a worker replaced it")
        _log.info("worker_hello", rank=hello.rank, pid=hello.pid, device=hello.device)
        self._identity = identity
        # A worker that had run plans of an earlier master or connection loads anew, and so
        # forgets their sequences, before it sees a plan of ours; others just say ready.
        self._send(LoadModel(self._settings.model.name))

    def _ready(self, ready: WorkerReady, now: float) -> None:
        if self._vigil is not None:
            return
        self._vigil = WorkerVigil(now)
        self._was_ready = True
        self._owner.worker_ready(ready)

    def _failed(self, message: WorkerFailed, now: float) -> None:
        if message.step >= 0:
            if self._vigil is not None:
                self._vigil.result(0.0, now)
            self._owner.worker_failed_step(message)
            return
        self._failure = message
        self._lose(f"the worker could not load: {message.message}")

    def _on_gone(self, identity: bytes) -> None:
        if identity == self._identity:
            self._lose("the connection to the worker is lost")

    # -- its end -----------------------------------------------------------------------------

    def _check(self) -> None:
        now = time.monotonic()
        if self._vigil is not None:
            reason = self._vigil.verdict(now)
            if not reason and self._vigil.is_hushed(now) and is_process_stopped(self._pid):
                reason = "its process was stopped by a signal"
        elif self._target is not None and self._children.pids:
            waited_s = now - self._started_at
            limit_s = self._settings.master.worker_start_s
            reason = f"not ready after {waited_s:.0f} s" if waited_s > limit_s else ""
        else:
            reason = ""
        if not reason:
            return
        if self._target is None:
            # Not ours to kill: it ends itself, and whoever started it starts it again.
            self._send(StopWorker())
        self._lose(reason)
        self._started_at = now
        self._children.signal(self._name, signal.SIGKILL)

    def _lose(self, reason: str) -> None:
        """The connection is given up; a process of ours is ended, and its end restarts it."""
        if self._identity is None and self._vigil is None:
            return
        was_ready = self._vigil is not None
        self._identity = None
        self._vigil = None
        # A process that lives on gets its time to come back and load anew.
        self._started_at = time.monotonic()
        if self._ending:
            return
        _log.warning("worker_lost", reason=reason)
        if self._target is not None and self._failure is None:
            self._actor.later(STOP_S, self._kill_if_lost, self._pid)
        if was_ready:
            self.num_ends += 1
            self._owner.worker_lost(reason)

    def _kill_if_lost(self, pid: int) -> None:
        """A process that lost its connection and has not come back is of no use."""
        if pid and self._identity is None and self._pid == pid:
            self._children.signal(self._name, signal.SIGKILL)

    def _on_exit(self, end: ChildExit) -> None:
        self._lose(f"its process ended with {end.code}")
        if end.expected or self._ending or self._actor.stopping:
            return
        now = time.monotonic()
        delay_s = self._restarts.ended(end.code, now, was_ready=self._was_ready)
        if delay_s is None:
            failure = self._failure
            code = failure.code if failure else "internal_error"
            text = failure.message if failure else f"the worker ended with exit code {end.code}"
            exit_code = self._restarts.exit_code
            self._owner.worker_given_up(exit_code, code, text)
            return
        _log.warning("worker_restarts", code=end.code, delay_s=delay_s)
        self._actor.later(delay_s, self.start)
