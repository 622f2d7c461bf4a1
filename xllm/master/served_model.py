"""One model of a master: an instance to its routers, with sockets, heartbeats, an entry in the
registry and a scheduler of its own.

A master has one for each of its models, over one worker and one memory (`actor`). It decides
nothing about requests. Invariant: every request that a router sent gets one terminal word, unless
that router cancelled it or is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from xllm.config.settings import Settings
from xllm.errors import TransportError, UnavailableError, WorkerLostError
from xllm.master.conversation import RouterConversation
from xllm.master.heartbeat import HeartbeatMaker
from xllm.master.metrics import MasterMetrics
from xllm.master.plan_pump import PlanPump
from xllm.master.registration import InstanceRegistration, make_record
from xllm.master.scheduler import Scheduler
from xllm.master.step_loop import StepLoop
from xllm.protocol.bus import SnapshotOfBlocks
from xllm.protocol.records import InstanceRecord
from xllm.protocol.step import WorkerReady
from xllm.protocol.transport.endpoint import own_endpoint
from xllm.protocol.transport.pubsub import PublisherSocket

if TYPE_CHECKING:
    from xllm.master.actor import MasterActor

_log = structlog.get_logger("master")
TOPIC = b"instance"


class ServedModel:
    """Lives inside the master's actor. `settings`: as if this were the master's only model."""

    def __init__(self, master: MasterActor, settings: Settings, index: int, pump: PlanPump) -> None:
        self._master = master
        self.settings = settings
        self.index = index
        self.name = f"{master.name}.{index}" if index else master.name
        """Of this instance, to routers."""
        self.transport = master.transport
        self.workers = master.workers
        self.metrics = MasterMetrics()
        self.ready: WorkerReady | None = None
        self.is_draining = False
        self.is_asleep = False
        self._heartbeats = HeartbeatMaker(self.name, master.incarnation, self.metrics)
        own = settings.master
        self._bus = PublisherSocket(self.transport, self._endpoint(own.bus_endpoint, "bus"))
        self.bus_endpoint = self._bus.endpoint
        self.conversation = RouterConversation(self, self._endpoint(own.endpoint, "instance"))
        self.steps = StepLoop(
            settings.model.name,
            pump,
            self.conversation.route,
            master.scheduler_failed,
            self.metrics,
        )
        pump.loops[settings.model.name] = self.steps
        self.registration = InstanceRegistration(
            settings, self.name, master.incarnation, self.transport, master.replaced
        )

    @property
    def model(self) -> str:
        """The name that clients use, once the worker said it."""
        return self.ready.model if self.ready is not None else self.settings.model.name

    @property
    def state(self) -> str:
        """loading, ready, asleep, draining or failed, as heartbeats say it."""
        if self._master.has_given_up:
            return "failed"
        if self.is_draining:
            return "draining"
        if self.is_asleep:
            return "asleep"
        return "ready" if self.scheduler is not None else "loading"

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler of the ready worker; None while there is none."""
        return self.steps.scheduler

    # -- what the conversation asks of its master ----------------------------------------------

    def later(self, delay_s: float, function: Callable[..., None], *args: Any) -> None:
        """See Actor."""
        self._master.later(delay_s, function, *args)

    def spawn(self, coroutine: Any) -> None:
        """See Actor."""
        self._master.spawn(coroutine)

    def begin_drain(self) -> None:
        """Admit nothing more, from now on."""
        self.is_draining = True
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

    async def set_sleep(self, asleep: bool, timeout_s: float, drop_weights: bool) -> None:
        """Put the model to sleep, what runs ending in `timeout_s` or being ended as unavailable;
        or wake it. XllmError where it cannot be woken."""
        if asleep:
            await self._master.sleeping.sleep(self, timeout_s, drop_weights)
        else:
            await self._master.sleeping.wake(self)

    # -- life ----------------------------------------------------------------------------------

    def serve(self, scheduler: Scheduler, ready: WorkerReady) -> None:
        """Requests may come from now on."""
        if self.is_draining:
            scheduler.drain()
        self.ready = ready
        self.steps.begin(scheduler)
        _log.info("instance_ready", model=ready.model, num_blocks=ready.num_blocks)
        self.beat()

    async def wait_for_name(self) -> None:
        """See InstanceRegistration."""
        await self.registration.wait_for_name()

    async def register(self) -> None:
        """Say in the registry what is served now; returns when it is there. NameTakenError where
        another living process has the name."""
        await self.registration.publish(self.record())

    def worker_lost(self, reason: str, by_itself: bool, num_in_steps: int) -> None:
        """All requests end, and routers resubmit them elsewhere, or here again. Those in the steps
        under way, `num_in_steps` with those of other models, are told apart: one of them may be the
        reason, where the worker ended by itself.
        """
        if self.scheduler is None:
            return
        self.metrics.num_worker_ends += 1
        self._heartbeats.forget_blocks(self.scheduler)
        self.steps.fail_all(
            UnavailableError.code,
            reason,
            in_step=WorkerLostError.code,
            blameless=not by_itself,
            shared=num_in_steps > 1,
        )
        self.steps.scheduler = None
        self.conversation.fail_probes()
        self.beat()

    def abandon(self, *, shared: bool) -> None:
        """State that cannot be serves nobody: routers are told and go elsewhere. What is open may
        be the reason, and must not do that to one instance after the other; `shared`: or something
        else that is."""
        self.steps.abandon()
        self.conversation.end_all(WorkerLostError.code, "the instance failed", shared=shared)

    async def withdraw(self) -> None:
        """Leave the registry."""
        await self.registration.withdraw()

    def close(self) -> None:
        """Close the sockets."""
        self.conversation.close()
        self._bus.close()

    def record(self) -> InstanceRecord:
        """What the registry says of this instance; it must be ready."""
        assert self.ready is not None
        own = self.settings.master
        return make_record(
            self.ready,
            self.settings,
            name=self.name,
            incarnation=self._master.incarnation,
            endpoint=own.advertised_endpoint or self.conversation.endpoint,
            bus_endpoint=own.advertised_bus_endpoint or self.bus_endpoint,
            public_key=self.transport.public_key,
        )

    # -- the bus -------------------------------------------------------------------------------

    def beat(self) -> None:
        """Publish a heartbeat; also ends requests whose deadline passed in a quiet time."""
        self.steps.pump()
        # What the worker counts is said once.
        metrics = self.workers.metrics + self.transport.metrics() if self.index == 0 else b""
        beat = self._heartbeats.make(
            self.state,
            self.conversation.commands.role,
            self.scheduler,
            metrics,
            self.workers.states,
        )
        try:
            self._bus.publish(TOPIC, beat)
        except TransportError as error:
            _log.warning("heartbeat_lost", error=error.message)

    def snapshot(self) -> SnapshotOfBlocks:
        """All cached blocks, as of the heartbeat that was published just before."""
        self.beat()
        hashes = self.scheduler.snapshot_blocks() if self.scheduler is not None else b""
        return SnapshotOfBlocks(self.name, self._master.incarnation, self._heartbeats.seq, hashes)

    def _endpoint(self, configured: str, kind: str) -> str:
        """Where to bind: what is configured is the first model's; further ones of a port take any
        free one, those of a path one beside it. The registry knows them."""
        if not configured or not self.index:
            return own_endpoint(configured, self.settings.cluster.run_dir, f"{self.name}-{kind}")
        if configured.startswith("tcp://"):
            return f"{configured.rpartition(':')[0]}:0"
        return f"{configured}.{self.index}"
