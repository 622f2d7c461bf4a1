"""The worker's shell: messages between the master and the engine, and pulses.

It decides when to greet, what is dropped while no master listens, and when the process must end.
It knows no model. Invariant: a WorkerHello is the first message of every connection; results of a
plan go to the connection that the plan came from, or nowhere.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable

import structlog

from xllm.config.settings import Settings
from xllm.errors import (
    DeviceLostError,
    FencedError,
    InvariantError,
    TransportError,
    XllmError,
)
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.reporter import LaunchReporter
from xllm.protocol.actor.starvation import process_meter
from xllm.protocol.codec import Decoder
from xllm.protocol.step import (
    PULSE_PERIOD_S,
    LoadModel,
    LoadProgress,
    MasterMessage,
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
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.endpoint import split_key
from xllm.worker.engine import Engine, InlineEngine, ThreadEngine
from xllm.worker.executor import Executor
from xllm.worker.job_runner import EngineAnswer, JobRunner
from xllm.worker.meter import StepMeter
from xllm.worker.rank_board import RankBoard

_log = structlog.get_logger("worker")

LAST_WORD_S = 0.1
"""What a last message gets to leave the socket, which closes without lingering."""
METRICS_EVERY = 5
"""Pulses between two that carry metrics."""
STEP_GRACE_S = 30.0
"""What the step in flight gets at a shutdown before the process ends without it."""


class WorkerActor(Actor):
    """One device's worker, connected to `settings.master.worker_endpoint`."""

    def __init__(
        self,
        settings: Settings,
        make: Callable[[Settings], Executor],
        transport: Transport | None = None,
    ) -> None:
        super().__init__(worker_name(settings), transport, settings.cluster.keys_dir)
        self._settings = settings
        self._rank = settings.worker.rank
        self._incarnation = uuid.uuid4().hex
        self._engine = self._make_engine(JobRunner(lambda: make(settings), self._rank))
        self._closers: list[Callable[[], None]] = []
        self._ready: WorkerReady | None = None
        self._load_failure: WorkerFailed | None = None
        self._fresh = False  # loaded, and no plan ran since
        self._loading = False
        self._board = RankBoard("")
        self._meter = StepMeter()
        self._num_pulses = 0
        self._last_counter = -1
        self._starvation = process_meter(os.getpid())
        self._num_unsent = 0
        self._num_pending = 0  # plans and pings without an answer, oldest first
        self._num_stale = 0  # of those, the ones whose master is gone

    async def start(self) -> None:
        """Connect to the master and begin to load the model."""
        settings = self._settings
        self._reporter = LaunchReporter(
            self.transport, settings.cluster.launcher, "worker", self.name
        )
        self._closers.append(self._reporter.close)
        self._reporter.started(f"{settings.worker.engine} engine")
        self._engine.start()
        endpoint, server_key = split_key(settings.master.worker_endpoint, "master.worker_endpoint")
        server_key = server_key or self.transport.public_key  # of a master of the same node
        self._socket: DealerSocket[MasterMessage] = DealerSocket(
            self.transport,
            endpoint,
            Decoder(MasterMessage),
            self._on_message,
            on_connected=self._greet,
            on_gone=self._master_gone,
            server_key=server_key,
            name="master",
        )
        self._closers.append(self._socket.close)
        if self._socket.connected:
            self._greet()
        self._load()
        self.every(min(settings.cluster.heartbeat_s, PULSE_PERIOD_S), self._pulse)

    async def stop(self) -> None:
        """Finish the step in flight, then close."""
        self._board.close()
        if not await self._engine.stop(STEP_GRACE_S):
            _log.warning("engine_abandoned", counter=self._engine.counter)
        for close in reversed(self._closers):
            close()

    def _make_engine(self, runner: JobRunner) -> Engine:
        worker = self._settings.worker
        if worker.engine == "toy" and worker.toy_step_ms == 0:
            return InlineEngine(runner, self._deliver)
        return ThreadEngine(runner, self._deliver)

    # -- from the master ---------------------------------------------------------------------

    def _on_message(self, message: MasterMessage, frames: list[bytes]) -> None:
        if isinstance(message, StepPlan):
            self._fresh = False
            self._num_pending += 1
            self._engine.submit(message)
        elif isinstance(message, StopWorker):
            self.request_stop(FencedError.exit_code, "its master told it to end", FencedError.code)
        elif isinstance(message, RankNotice):
            if message.group == self._board.group:
                self._board.hear(message.key, message.value)
        elif isinstance(message, SleepModel | WakeModel):
            self._fresh = False
            self._engine.submit(message)
        elif not isinstance(message, LoadModel):
            self._num_pending += 1
            self._engine.submit(message)
        elif message.group:
            # The ranks meet anew: whatever was loaded or under way, this comes behind it.
            self._load(message.group)
        elif self._fresh and self._ready is not None:
            self._send(self._ready)
        elif not self._loading:
            self._load()

    def _load(self, group: str = "") -> None:
        self._loading = True
        if not group:
            self._engine.submit(LoadModel(self._settings.model.name))
            return
        # The engine may still wait for a meeting that will not be.
        self._board.close()
        self._board = RankBoard(group)
        self._engine.submit(self._board)

    def _greet(self) -> None:
        worker = self._settings.worker
        self._send(WorkerHello(self._rank, self._incarnation, os.getpid(), worker.device))
        if self._load_failure is not None:
            self._send(self._load_failure)
        elif self._fresh and self._ready is not None:
            self._send(self._ready)
        # Otherwise another master's plans ran here: this one asks for a fresh load first.

    def _master_gone(self) -> None:
        _log.warning("master_gone", endpoint=self._socket.endpoint)
        self._num_stale = self._num_pending
        if not self._socket.connected:
            self._socket.discard_queued()

    # -- to the master -----------------------------------------------------------------------

    def _deliver(self, answer: EngineAnswer) -> None:
        try:
            message, frames, error = answer
            if isinstance(error, DeviceLostError):
                # Unanswered: this process ends, and what it ran is run elsewhere.
                _log.error("device_lost", error=error.message)
                self.request_stop(error.exit_code, error.message, error.code)
                return
            if not self._is_stale(message):
                self._send(message, frames)
            if isinstance(message, StepResult):
                self._socket.flush()  # tokens wait for no pulse
                self._meter.add(message)
            elif isinstance(message, LoadProgress):
                self._reporter.progress(message.loaded_bytes, message.total_bytes)
            elif isinstance(message, WorkerReady):
                self._loaded(message)
            elif isinstance(message, WorkerFailed) and error is not None:
                self._engine_failed(message, error)
        except Exception as failure:
            # The engine's hand-over must go on with its next answer.
            self._failed(failure)

    def _is_stale(self, message: WorkerMessage) -> bool:
        """Count the answer of a plan or ping; whether the one who asked is gone."""
        failed_step = isinstance(message, WorkerFailed) and message.step >= 0
        if not failed_step and not isinstance(message, StepResult | WorkerPong):
            return False
        self._num_pending -= 1
        if self._num_stale == 0:
            return False
        self._num_stale -= 1
        return True

    def _loaded(self, ready: WorkerReady) -> None:
        self._loading = False
        self._fresh = True
        if self._ready is None:
            _log.info("model_loaded", model=ready.model, device=ready.device, load_s=ready.load_s)
            self._reporter.ready(detail=f"{ready.model} on {ready.device}")
        self._ready = ready

    def _engine_failed(self, message: WorkerFailed, error: XllmError) -> None:
        _log.error("engine_failed", step=message.step, code=message.code, error=message.message)
        if message.step < 0:
            self._load_failure = message
            self._reporter.failed(message.code, message.message)
        if message.step < 0 or isinstance(error, InvariantError):
            reason = message.message
            self.later(LAST_WORD_S, self.request_stop, error.exit_code, reason, error.code)

    def _pulse(self) -> None:
        self._num_pulses += 1
        metrics = b"" if self._num_pulses % METRICS_EVERY else self._meter.prometheus(self._rank)
        counter, busy = self._engine.counter, self._engine.busy
        starvation = self._starvation
        if busy and counter == self._last_counter:
            starvation.look(time.monotonic())
        else:
            starvation.rest(time.monotonic())
        self._last_counter = counter
        self._send(WorkerPulse(self._rank, counter, busy, metrics, starvation.denied_s))

    def _send(self, message: WorkerMessage, frames: tuple[bytes, ...] = ()) -> None:
        """Send now or not at all: what is said while no master listens concerns nobody, and the
        next master is greeted first."""
        if not self._socket.connected:
            self._num_unsent += 1
            return
        try:
            self._socket.send(message, frames)
        except TransportError as error:
            self._num_unsent += 1
            _log.warning("message_unsent", kind=type(message).__name__, error=error.message)


def worker_name(settings: Settings) -> str:
    """The name of this process in logs and reports."""
    rank = f"worker-{settings.worker.rank}"
    return f"{settings.master.name}/{rank}" if settings.master.name else rank
