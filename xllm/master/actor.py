"""The master's shell: routers on one side, a worker on the other, schedulers between.

It decides nothing about requests: it starts the parts, hands over between the worker and its models
(`served_model`), registers and drains. All models of a master share its worker's memory and its
time; each is an instance of its own to routers.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
import uuid
from collections.abc import Callable

import structlog

from xllm.config.models import each_model
from xllm.config.settings import Settings
from xllm.errors import ConfigError, FencedError, NameTakenError
from xllm.kvcache.owners import SharedMemory
from xllm.master.limits import InstanceLimits
from xllm.master.plan_pump import PlanPump
from xllm.master.profiling import StartProfile
from xllm.master.rank_processes import WorkerTarget
from xllm.master.scheduler import Scheduler
from xllm.master.served_model import ServedModel
from xllm.master.sleeping import Sleeping
from xllm.master.strategies.page_turns import PageTurns
from xllm.master.strategies.policy import build_policy
from xllm.master.workers import WorkerGroup
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.reporter import LaunchReporter
from xllm.protocol.step import ModelAwake, StepResult, WorkerFailed, WorkerReady
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.endpoint import own_endpoint

_log = structlog.get_logger("master")
_LAST_WORD_S = 0.1
"""What last words get to leave the sockets, which close without lingering."""


def master_name(settings: Settings) -> str:
    """The name of this instance."""
    return settings.master.name or f"instance-{os.getpid()}"


class MasterActor(Actor):
    """One worker (of one or several ranks) and the models that it runs. `worker_target`: first
    function of its worker processes; without one, or with `master.spawn_workers` off, workers are
    started on their own and connect."""

    def __init__(
        self,
        settings: Settings,
        worker_target: WorkerTarget | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(master_name(settings), transport, settings.cluster.keys_dir)
        self.incarnation = uuid.uuid4().hex
        self.has_given_up = False
        self.models: list[ServedModel] = []
        """What is served, the first one first; none before the start."""
        self._settings = settings
        self._each = each_model(settings)
        if settings.master.spawn_workers and worker_target is None:
            raise ConfigError("nothing to spawn as a worker", param="master.spawn_workers")
        self._target = worker_target if settings.master.spawn_workers else None
        self._was_ready = False
        self._has_last_words = False
        self._workers: WorkerGroup | None = None
        self._sleeping: Sleeping | None = None
        self._profile: StartProfile | None = None
        self._reporter: LaunchReporter | None = None

    @property
    def workers(self) -> WorkerGroup:
        """The workers' side, once started."""
        assert self._workers is not None
        return self._workers

    @property
    def sleeping(self) -> Sleeping:
        """Sleep and wake, once started."""
        assert self._sleeping is not None
        return self._sleeping

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind the sockets and start the workers; registration follows when they are ready."""
        settings = self._settings
        launcher = settings.cluster.launcher
        self._reporter = LaunchReporter(self.transport, launcher, "master", self.name)
        self._reporter.started()
        endpoint = settings.master.worker_endpoint
        self._workers = WorkerGroup(
            self,
            self,
            settings,
            own_endpoint(endpoint, settings.cluster.run_dir, f"{self.name}-worker"),
            self._target,
        )
        pump = PlanPump(
            tuple(one.model.name for one in self._each),
            2 if settings.scheduler.async_scheduling else 1,
            self._workers.send_plan,
            self.scheduler_failed,
        )
        self._sleeping = Sleeping(self._workers, pump)
        for index, own in enumerate(self._each):
            self.models.append(ServedModel(self, own, index, pump))
        self._workers.start()
        self.every(settings.cluster.heartbeat_s, self.beat)
        self.spawn(self._check_names())

    async def stop(self) -> None:
        """Finish what is open, within the time for it; then leave in order."""
        num_open = sum(one.steps.num_open for one in self.models)
        if self._reporter is not None:
            self._reporter.stopping(num_open)
        if not self._exit_code:
            for one in self.models:
                one.begin_drain()  # routers must hear it before the record is gone
        if num_open and not self._exit_code:
            await self.drain(self._settings.cluster.shutdown_s)
            self._has_last_words = True
        if self._has_last_words:
            await asyncio.sleep(_LAST_WORD_S)
        await asyncio.gather(*(one.withdraw() for one in self.models))
        if self._workers is not None:
            await self._workers.stop()
        for one in self.models:
            one.close()
        if self._reporter is not None:
            self._reporter.close()

    def _fatal(self, error: BaseException) -> None:
        """State that cannot be serves nobody: routers are told and go elsewhere."""
        self.has_given_up = True
        num_open = sum(len(one.conversation.routes) for one in self.models)
        for one in self.models:
            one.abandon(shared=num_open > 1)
            self._has_last_words = True
        super()._fatal(error)

    def scheduler_failed(self, error: Exception) -> None:
        """Whatever nobody else could catch of a scheduler ends the process, as it should."""
        self._failed(error)

    async def drain(self, timeout_s: float) -> int:
        """Wait until nothing is open, and after `timeout_s` end the rest as unavailable. Returns
        how many those were."""
        return sum(await asyncio.gather(*(one.drain(timeout_s) for one in self.models)))

    # -- workers (WorkerOwner) -----------------------------------------------------------------

    def worker_ready(self, ready: WorkerReady) -> None:
        """Measure, then begin to schedule, and register."""
        settings = self._settings.scheduler
        reports = (ready, *ready.more)
        if len(reports) != len(self.models):
            self.worker_given_up(
                ConfigError.exit_code,
                ConfigError.code,
                f"the worker has {len(reports)} models, the master {len(self.models)}: "
                "model.more differs",
            )
            return
        memory = SharedMemory(ready.num_blocks, len(reports))
        turns = PageTurns() if len(reports) > 1 else None
        pairs: list[tuple[ServedModel, Scheduler, WorkerReady]] = []
        for one, report in zip(self.models, reports, strict=True):
            limits = InstanceLimits.from_ready(report, settings, one.name)
            owned = memory.add(
                report.model,
                num_slots=limits.num_slots,
                pages_per_slot=limits.pages_per_slot,
                max_mappings=limits.max_mappings,
            )
            pairs.append((one, Scheduler(limits, build_policy(settings), owned, turns), report))
        self._measure(pairs, 0, functools.partial(self.sleeping.begin, memory, turns))

    def _measure(
        self,
        pairs: list[tuple[ServedModel, Scheduler, WorkerReady]],
        at: int,
        begin: Callable[[list[ServedModel]], None],
    ) -> None:
        """Profile one model after another from the one at `at` on, then serve all; `begin` is told
        of them."""
        self._profile = None
        profile_ms = self._settings.scheduler.profile_ms
        # A toy's steps take what its settings say.
        is_measured = profile_ms and not self._was_ready and self._settings.worker.engine != "toy"
        if is_measured and at < len(pairs):
            self._profile = StartProfile(
                pairs[at][1],
                profile_ms / 1000,
                self.workers.send_plan,
                lambda: self._measure(pairs, at + 1, begin),
            )
            self._profile.begin(time.monotonic())
            return
        for one, scheduler, report in pairs:
            one.serve(scheduler, report)
        begin(self.models)
        first, self._was_ready = not self._was_ready, True
        self.spawn(self._register(first))

    async def _check_names(self) -> None:
        """Beside the load, which a process that may not have its name need not end."""
        try:
            await asyncio.gather(*(one.wait_for_name() for one in self.models))
        except NameTakenError as error:
            self.worker_given_up(error.exit_code, error.code, error.message)

    def replaced(self, reason: str) -> None:
        """Another process has this one's name, and routers go there."""
        self.worker_given_up(FencedError.exit_code, FencedError.code, reason)

    async def _register(self, first: bool) -> None:
        try:
            await asyncio.gather(*(one.register() for one in self.models))
        except NameTakenError as error:
            self.worker_given_up(error.exit_code, error.code, error.message)
            return
        if first and self._reporter is not None:
            reports = [one.ready for one in self.models if one.ready is not None]
            names = ", ".join(one.model for one in reports)
            self._reporter.ready(
                (("instance", self.models[0].conversation.endpoint),),
                f"{names} on {reports[0].device}, {reports[0].num_blocks} blocks of "
                f"{reports[0].block_size}",
            )

    def worker_lost(self, reason: str, by_itself: bool) -> None:
        """All requests of all models end."""
        self._profile = None
        self.sleeping.worker_lost()
        num_in_steps = sum(one.steps.num_in_steps for one in self.models)
        if by_itself and any(one.steps.is_lone for one in self.models):
            self.workers.excuse()
        for one in self.models:
            one.worker_lost(reason, by_itself, num_in_steps)

    def worker_result(self, result: StepResult, frames: list[bytes]) -> None:
        """Settle the step; the next one is planned after what else has come in."""
        if self._profile is not None:
            self._profile.settle(result, frames, time.monotonic())
            return
        self._of(result.model).steps.settle(result, frames)

    def worker_failed_step(self, message: WorkerFailed) -> None:
        """The step's requests end; others go on."""
        if self._profile is not None:
            self._profile.fail(message.step, message.code, message.message, time.monotonic())
            return
        self._of(message.model).steps.fail_step(message.step, message.code, message.message)

    def model_awake(self, message: ModelAwake) -> None:
        """A model may be scheduled again, or may not."""
        self.sleeping.answered(message)

    def worker_pong(self, nonce: int) -> None:
        """The data path works: whose probe it was knows the number."""
        for one in self.models:
            one.conversation.answer_probe(nonce, True)

    def worker_given_up(self, exit_code: int, code: str, reason: str) -> None:
        """Nothing will come back here."""
        _log.error("instance_given_up", code=code)  # why is said at the end
        self.has_given_up = True
        self.beat()
        if self._reporter is not None:
            self._reporter.failed(code, reason)
        self.request_stop(exit_code, reason, code)

    def beat(self) -> None:
        """Publish the heartbeats of all models."""
        for one in self.models:
            one.beat()

    def _of(self, model: str) -> ServedModel:
        """Whose step that is. A worker knows no names but those of plans."""
        if len(self.models) == 1:
            return self.models[0]
        return next(one for one in self.models if one.model == model)
