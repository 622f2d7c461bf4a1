"""Sleep and wake: a model gives its pages to the others, and perhaps its weights back.

A shell around `kvcache.owners`. A model that is put to sleep takes nothing more from that moment
on; what it runs ends, or is ended; then its pages are the others'. The worker forgets it in the
order of its plans, so that nothing of it runs later. Waking waits for the worker, who runs nothing
meanwhile if weights are read. Invariant: the books and the worker agree on who sleeps, also after
the worker was lost: who slept is put to sleep again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

import structlog

from xllm.errors import UnavailableError, error_from_code
from xllm.kvcache.owners import SharedMemory
from xllm.master.plan_pump import PlanPump
from xllm.master.strategies.page_turns import PageTurns
from xllm.protocol.step import ModelAwake, SleepModel, WakeModel

if TYPE_CHECKING:
    from xllm.master.served_model import ServedModel
    from xllm.master.workers import WorkerGroup

_log = structlog.get_logger("master")


class Sleeping:
    """Who sleeps, of the models of one worker."""

    def __init__(self, workers: WorkerGroup, pump: PlanPump) -> None:
        self._workers = workers
        self._pump = pump
        self._memory: SharedMemory | None = None
        self._turns: PageTurns | None = None
        self._dropped: dict[str, bool] = {}  # of those asleep: whether their weights are dropped
        self._waking: asyncio.Future[ModelAwake] | None = None
        self._one_at_a_time = asyncio.Lock()

    def begin(
        self, memory: SharedMemory, turns: PageTurns | None, models: Iterable[ServedModel]
    ) -> None:
        """A worker is ready, and all its models are awake: those that slept sleep on."""
        self._memory, self._turns = memory, turns
        for one in models:
            if one.is_asleep:
                self._give_back(one)

    def worker_lost(self) -> None:
        """Nobody will answer."""
        self._memory = None
        if self._waking is not None and not self._waking.done():
            self._waking.set_exception(UnavailableError("the worker is lost"))

    def answered(self, message: ModelAwake) -> None:
        """The worker's word on a wake."""
        if self._waking is not None and not self._waking.done():
            self._waking.set_result(message)

    async def sleep(self, one: ServedModel, timeout_s: float, drop_weights: bool) -> None:
        """Returns once its pages are free. A model that sleeps may drop its weights later."""
        async with self._one_at_a_time:
            was_asleep, dropped = one.is_asleep, self._dropped.get(one.name, False)
            self._dropped[one.name] = dropped or drop_weights
            if was_asleep and dropped >= drop_weights:
                return
            one.is_asleep = True
            one.beat()
            await one.steps.wait_drained(timeout_s)
            # Also takes back what a step under way holds: the worker ends it before it reads more.
            one.steps.fail_all(UnavailableError.code, f"the model {one.model} goes to sleep")
            if self._memory is not None:
                self._give_back(one)
            _log.info("model_asleep", model=one.model, dropped=self._dropped[one.name])

    async def wake(self, one: ServedModel) -> None:
        """Returns once it takes requests. XllmError where it cannot: it sleeps on."""
        async with self._one_at_a_time:
            if not one.is_asleep:
                return
            memory = self._memory
            if memory is not None:
                await self._ask(one.model)
                memory.wake(one.model)
            self._dropped.pop(one.name, None)
            one.is_asleep = False
            one.beat()
            _log.info("model_awake", model=one.model)

    async def _ask(self, model: str) -> None:
        self._waking = asyncio.get_running_loop().create_future()
        self._pump.hold()
        try:
            self._workers.tell(WakeModel(model))
            answer = await self._waking
        finally:
            self._waking = None
            self._pump.release()
        if answer.code:
            raise error_from_code(answer.code, answer.message)

    def _give_back(self, one: ServedModel) -> None:
        assert self._memory is not None
        self._memory.sleep(one.model)
        if self._turns is not None:
            self._turns.leave(one.model)
        self._workers.tell(SleepModel(one.model, self._dropped.get(one.name, False)))
        self._pump.pump()
