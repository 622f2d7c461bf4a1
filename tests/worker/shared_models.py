"""Several models at one executor, each with its scheduler, without sockets: as the master does."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from xllm.config.scheduling import SchedulerSettings
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.kvcache.owners import SharedMemory
from xllm.master.limits import InstanceLimits
from xllm.master.scheduler import Scheduler
from xllm.master.strategies.page_turns import PageTurns
from xllm.master.strategies.policy import build_policy
from xllm.master.strategies.step_turns import StepTurns
from xllm.protocol.instance import AdmitRequest, RequestEnded
from xllm.protocol.sampling import SamplingParams
from xllm.worker.executor import Executor, StepOutput


class SharedModels:
    """`streams` by (model, request, choice). `order`: whose steps ran."""

    def __init__(
        self, executor: Executor, settings: SchedulerSettings, max_in_flight: int = 2
    ) -> None:
        self.executor = executor
        ready = executor.load(lambda done, total: None)
        reports = (ready, *ready.more)
        self.memory = SharedMemory(ready.num_blocks, len(reports))
        self.pages = PageTurns()
        self.schedulers: dict[str, Scheduler] = {}
        for one in reports:
            limits = InstanceLimits.from_ready(one, settings)
            owned = self.memory.add(
                one.model,
                num_slots=limits.num_slots,
                pages_per_slot=limits.pages_per_slot,
                max_mappings=limits.max_mappings,
            )
            self.schedulers[one.model] = Scheduler(
                limits, build_policy(settings), owned, self.pages
            )
        self.turns = StepTurns(tuple(self.schedulers), max_in_flight)
        self.streams: dict[tuple[str, str, int], list[int]] = {}
        self.ended: dict[tuple[str, str], RequestEnded] = {}
        self.order: list[str] = []
        self._in_flight: deque[tuple[str, StepOutput]] = deque()
        self._now = 0.0

    def admit(
        self, model: str, request_id: str, prompt: Sequence[int], sampling: SamplingParams
    ) -> None:
        scheduler = self.schedulers[model]
        limits = scheduler.limits
        root = root_hash(limits.revision)
        hashes = chain_hashes(root, prompt, limits.block_size)
        request = AdmitRequest(request_id, 1, model, tuple(prompt), sampling, hashes, salt=root)
        assert scheduler.admit(request, self._now) is None

    def step(self) -> bool:
        """Plan what may be under way, settle the oldest."""
        self._now += 0.01
        while self.turns.has_room and self._plan():
            pass
        if not self._in_flight:
            return False
        model, output = self._in_flight.popleft()
        self.turns.done(model, 0.01)
        self.order.append(model)
        assert output.result.failed == ()
        outcome = self.schedulers[model].update(output.result, output.frames, self._now)
        for one in self.schedulers.values():
            one.check()
        self.memory.check()
        for item in outcome.items:
            stream = self.streams.setdefault((model, item.request_id, item.choice), [])
            assert item.first_index == len(stream)
            stream.extend(item.token_ids)
        self.ended.update(((model, ended.request_id), ended) for ended in outcome.ended)
        return True

    def run(self) -> None:
        """To the end of all requests."""
        while self.step():
            pass
        assert all(one.is_idle for one in self.schedulers.values())
        assert all(ended.code == "" for ended in self.ended.values())

    def sleep(self, model: str, drop_weights: bool = False) -> None:
        self.memory.sleep(model)
        self.pages.leave(model)
        self.executor.sleep(model, drop_weights)

    def wake(self, model: str) -> None:
        self.executor.wake(model, lambda done, total: None)
        self.memory.wake(model)

    def _plan(self) -> bool:
        for model in self.turns.order():
            if not self.memory.models[model].is_awake:
                continue
            plan = self.schedulers[model].schedule(self._now)
            if plan is not None:
                self.turns.sent(model)
                self._in_flight.append((model, self.executor.execute(plan)))
                return True
        return False
