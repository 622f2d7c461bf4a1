"""The master's shell: routers on one side, workers on the other, the scheduler between.

It decides nothing about requests: it starts the parts, hands over between them, registers, beats
and drains. Invariant: every request that a router sent gets one terminal word, unless that router
cancelled it or is gone.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid

import structlog

from xllm.config.settings import Settings
from xllm.errors import ConfigError, TransportError, UnavailableError, WorkerLostError
from xllm.master.conversation import RouterConversation
from xllm.master.heartbeat import HeartbeatMaker
from xllm.master.limits import InstanceLimits
from xllm.master.metrics import MasterMetrics
from xllm.master.profiling import StartProfile
from xllm.master.rank_processes import WorkerTarget
from xllm.master.registration import InstanceRegistration, make_record
from xllm.master.scheduler import Scheduler
from xllm.master.step_loop import StepLoop
from xllm.master.strategies.policy import build_policy
from xllm.master.workers import WorkerGroup
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.reporter import LaunchReporter
from xllm.protocol.bus import SnapshotOfBlocks
from xllm.protocol.records import InstanceRecord
from xllm.protocol.step import StepResult, WorkerFailed, WorkerReady
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.protocol.transport.security import Security

_log = structlog.get_logger("master")
TOPIC = b"instance"
_LAST_WORD_S = 0.1
"""What last words get to leave the sockets, which close without lingering."""


def master_name(settings: Settings) -> str:
    """The name of this instance."""
    return settings.master.name or f"instance-{os.getpid()}"


class MasterActor(Actor):
    """One instance. `worker_target`: first function of its worker processes; without one, or with
    `master.spawn_workers` off, workers are started on their own and connect."""

    def __init__(
        self,
        settings: Settings,
        worker_target: WorkerTarget | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(master_name(settings), transport)
        self.incarnation = uuid.uuid4().hex
        self.metrics = MasterMetrics()
        self._settings = settings
        if settings.master.spawn_workers and worker_target is None:
            raise ConfigError("nothing to spawn as a worker", param="master.spawn_workers")
        self._target = worker_target if settings.master.spawn_workers else None
        self._ready: WorkerReady | None = None
        self._draining = False
        self._given_up = False
        self._has_last_words = False
        self._loop: StepLoop | None = None
        self._bus: PublisherSocket | None = None
        self._conversation: RouterConversation | None = None
        self._workers: WorkerGroup | None = None
        self._registration: InstanceRegistration | None = None
        self._profile: StartProfile | None = None
        self._reporter: LaunchReporter | None = None
        self._heartbeats = HeartbeatMaker(self.name, self.incarnation, self.metrics)

    def make_transport(self) -> Transport:
        """With the node's keys, if it has any."""
        keys_dir = self._settings.cluster.keys_dir
        return Transport(Security.load(keys_dir) if keys_dir else None)

    # -- what the parts reach ------------------------------------------------------------------

    @property
    def state(self) -> str:
        """loading, ready, draining or failed, as heartbeats say it."""
        if self._given_up:
            return "failed"
        if self._draining:
            return "draining"
        return "ready" if self.scheduler is not None else "loading"

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler of the ready worker; None while there is none."""
        return self._loop.scheduler if self._loop is not None else None

    @property
    def steps(self) -> StepLoop:
        """The step loop, once started."""
        assert self._loop is not None
        return self._loop

    @property
    def conversation(self) -> RouterConversation:
        """The routers' side, once started."""
        assert self._conversation is not None
        return self._conversation

    @property
    def workers(self) -> WorkerGroup:
        """The workers' side, once started."""
        assert self._workers is not None
        return self._workers

    @property
    def bus_endpoint(self) -> str:
        """Where heartbeats are published, once started."""
        assert self._bus is not None
        return self._bus.endpoint

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind the sockets and start the workers; registration follows when they are ready."""
        settings = self._settings
        launcher = settings.cluster.launcher
        self._reporter = LaunchReporter(self.transport, launcher, "master", self.name)
        self._reporter.started()
        master = settings.master
        self._bus = PublisherSocket(self.transport, self._endpoint(master.bus_endpoint, "bus"))
        self._conversation = RouterConversation(self, self._endpoint(master.endpoint, "instance"))
        self._loop = StepLoop(
            lambda plan: self.workers.send_plan(plan),
            self._conversation.route,
            self._failed,
            self.metrics,
        )
        self._registration = InstanceRegistration(settings.cluster, self.name, self.transport)
        self._workers = WorkerGroup(
            self, self, settings, self._endpoint(master.worker_endpoint, "worker"), self._target
        )
        self._workers.start()
        self.every(settings.cluster.heartbeat_s, self.beat)

    async def stop(self) -> None:
        """Finish what is open, within the time for it; then leave in order."""
        if self._reporter is not None:
            self._reporter.stopping(self._loop.num_open if self._loop is not None else 0)
        if self._loop is not None and self._loop.num_open and not self._exit_code:
            await self.drain(self._settings.cluster.shutdown_s)
            self._has_last_words = True
        if self._has_last_words:
            await asyncio.sleep(_LAST_WORD_S)
        if self._registration is not None:
            await self._registration.withdraw()
        if self._workers is not None:
            await self._workers.stop()
        for socket in (self._conversation, self._bus, self._reporter):
            if socket is not None:
                socket.close()

    def _fatal(self, error: BaseException) -> None:
        """State that cannot be serves nobody: routers are told and go elsewhere."""
        self._given_up = True
        if self._loop is not None and self._conversation is not None:
            self._loop.abandon()
            self._conversation.end_all(UnavailableError.code, "the instance failed")
            self._has_last_words = True
        super()._fatal(error)

    def begin_drain(self) -> None:
        """Admit nothing more, from now on."""
        self._draining = True
        if self.scheduler is not None:
            self.scheduler.drain()
        self.beat()

    async def drain(self, timeout_s: float) -> int:
        """Wait until nothing is open, and after `timeout_s` end the rest as unavailable. Returns
        how many those were."""
        self.begin_drain()
        if await self.steps.wait_drained(timeout_s):
            return 0
        num_left = self.steps.num_open
        self.steps.fail_all(UnavailableError.code, "the instance is shutting down")
        return num_left

    def _endpoint(self, configured: str, kind: str) -> str:
        if configured:
            return configured
        run_dir = self._settings.cluster.run_dir
        if not run_dir:
            raise ConfigError(
                "neither an endpoint nor cluster.run_dir is set", param="master.endpoint"
            )
        return f"ipc://{run_dir}/{self.name}-{kind}"

    # -- workers (WorkerOwner) -----------------------------------------------------------------

    def worker_ready(self, ready: WorkerReady) -> None:
        """Begin to schedule, and register."""
        settings = self._settings.scheduler
        limits = InstanceLimits.from_ready(ready, settings, self.name)
        scheduler = Scheduler(limits, build_policy(settings))
        is_toy = self._settings.worker.engine == "toy"  # its steps take what its settings say
        if self._ready is not None or not settings.profile_ms or is_toy:
            self._serve(scheduler, ready)
            return
        self._profile = StartProfile(
            scheduler,
            settings.profile_ms / 1000,
            self.workers.send_plan,
            lambda: self._serve(scheduler, ready),
        )
        self._profile.begin(time.monotonic())

    def _serve(self, scheduler: Scheduler, ready: WorkerReady) -> None:
        """Requests may come from now on."""
        self._profile = None
        if self._draining:
            scheduler.drain()
        self.steps.begin(scheduler)
        first = self._ready is None
        self._ready = ready
        _log.info("instance_ready", model=ready.model, num_blocks=ready.num_blocks)
        self.beat()
        if self._registration is not None:
            self.spawn(self._register(first))
        if first and self._reporter is not None and not self._settings.cluster.registry:
            self._report_ready()

    async def _register(self, first: bool) -> None:
        assert self._registration is not None
        await self._registration.publish(self.record())
        if first and self._settings.cluster.registry:
            self._report_ready()

    def _report_ready(self) -> None:
        assert self._reporter is not None
        assert self._ready is not None
        ready = self._ready
        self._reporter.ready(
            (("instance", self.conversation.endpoint),),
            f"{ready.model} on {ready.device}, {ready.num_blocks} blocks of {ready.block_size}",
        )

    def record(self) -> InstanceRecord:
        """What the registry says of this instance; it must be ready."""
        assert self._ready is not None
        security = self.transport.security
        return make_record(
            self._ready,
            self._settings,
            name=self.name,
            incarnation=self.incarnation,
            endpoint=self.conversation.endpoint,
            bus_endpoint=self.bus_endpoint,
            public_key=security.public_key if security is not None else "",
        )

    def worker_lost(self, reason: str) -> None:
        """All requests end, and routers resubmit them elsewhere, or here again. Those in the step
        under way are told apart: one of them may be the reason."""
        self._profile = None
        if self.scheduler is None:
            return
        self.metrics.num_worker_ends += 1
        self._heartbeats.forget_blocks(self.scheduler)
        self.steps.fail_all(UnavailableError.code, reason, in_step=WorkerLostError.code)
        self.steps.scheduler = None
        self.conversation.fail_probes()
        self.beat()

    def worker_result(self, result: StepResult, frames: list[bytes]) -> None:
        """Settle the step; the next one is planned after what else has come in."""
        if self._profile is not None:
            self._profile.settle(result, frames, time.monotonic())
            return
        self.steps.settle(result, frames)

    def worker_failed_step(self, message: WorkerFailed) -> None:
        """The step's requests end; others go on."""
        if self._profile is not None:
            self._profile.fail(message.step, message.code, message.message, time.monotonic())
            return
        self.steps.fail_step(message.step, message.code, message.message)

    def worker_pong(self, nonce: int) -> None:
        """The data path works."""
        self.conversation.answer_probe(nonce, True)

    def worker_given_up(self, exit_code: int, code: str, reason: str) -> None:
        """Nothing will come back here."""
        _log.error("instance_given_up", code=code, reason=reason)
        self._given_up = True
        self.beat()
        if self._reporter is not None:
            self._reporter.failed(code, reason)
        self.request_stop(exit_code, reason)

    # -- the bus -------------------------------------------------------------------------------

    def beat(self) -> None:
        """Publish a heartbeat; also ends requests whose deadline passed in a quiet time."""
        if self._bus is None or self._workers is None:
            return
        self.steps.pump()
        beat = self._heartbeats.make(
            self.state, self.conversation.role, self.scheduler, self._workers.metrics
        )
        try:
            self._bus.publish(TOPIC, beat)
        except TransportError as error:
            _log.warning("heartbeat_lost", error=error.message)

    def snapshot(self) -> SnapshotOfBlocks:
        """All cached blocks, as of the heartbeat that was published just before."""
        self.beat()
        hashes = self.scheduler.snapshot_blocks() if self.scheduler is not None else b""
        return SnapshotOfBlocks(self.name, self.incarnation, self._heartbeats.seq, hashes)
