"""A model in this process with many requests at once: scheduler and executor, one step after the
other, without sockets.

The same decisions as a service's. What it lacks is the overlap of planning and computing: a
service plans a step while the one before it runs.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from xllm.cli.bench.measures import RequestRecord
from xllm.config.settings import Settings
from xllm.errors import EngineError
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.master.limits import InstanceLimits
from xllm.master.outcome import StepOutcome
from xllm.master.scheduler import Scheduler
from xllm.master.strategies.policy import build_policy
from xllm.protocol.instance import AdmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import StepPlan
from xllm.worker.executor import Executor

LocalRequest = tuple[tuple[int, ...], int]
"""Prompt and number of new tokens."""

StepObserver = Callable[[StepPlan, float], None]
"""Told of each step and the seconds that the executor took for it."""


class LocalEngine:
    """A loaded model. `with` closes it. Greedy, outputs of exact length."""

    def __init__(
        self, settings: Settings, executor: Executor, progress: Callable[[int, int], None]
    ) -> None:
        self._executor = executor
        try:
            self.ready = executor.load(progress)
        except BaseException:
            executor.close()
            raise
        # One step at a time: a plan's result is taken in before the next one is asked for. And
        # all requests come at once, however many a service would let wait.
        scheduler = dataclasses.replace(
            settings.scheduler, async_scheduling=False, max_waiting=sys.maxsize
        )
        self._scheduler = Scheduler(
            InstanceLimits.from_ready(self.ready, scheduler), build_policy(scheduler)
        )
        self._root = root_hash(self.ready.revision)
        self._serial = 0
        self._open: dict[str, RequestRecord] = {}
        self._start = 0.0

    def run(
        self,
        requests: Sequence[LocalRequest],
        ended: Callable[[RequestRecord], None] = lambda record: None,
        stepped: StepObserver = lambda plan, took_s: None,
    ) -> list[RequestRecord]:
        """All requests at once, to their ends; records in their order. A request that cannot
        run ends with its `error`."""
        self._start = time.perf_counter()
        records = []
        for index, (prompt, count) in enumerate(requests):
            record = RequestRecord(index, 0.0, self._clock(), num_prompt=len(prompt))
            records.append(record)
            self._admit(prompt, count, record, ended)
        while self._open:
            now = time.monotonic()
            self._take(self._scheduler.expire(now), ended)
            plan = self._scheduler.schedule(now)
            if plan is None:
                if self._open:
                    raise EngineError("the scheduler has nothing to do, and requests are open")
                break
            began = time.perf_counter()
            output = self._executor.execute(plan)
            stepped(plan, time.perf_counter() - began)
            outcome = self._scheduler.update(output.result, output.frames, time.monotonic())
            self._take(outcome, ended)
        return records

    def close(self) -> None:
        """Release the device's memory."""
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _clock(self) -> float:
        return time.perf_counter() - self._start

    def _admit(
        self,
        prompt: tuple[int, ...],
        count: int,
        record: RequestRecord,
        ended: Callable[[RequestRecord], None],
    ) -> None:
        context, asked = self.ready.max_model_len, len(prompt) + count
        if len(prompt) < context < asked:  # the scheduler would cut the output, not refuse it
            record.ended_s = self._clock()
            record.error = (
                f"context_length_exceeded: the context is {context} tokens; this asks for {asked}"
            )
            ended(record)
            return
        self._serial += 1
        name = str(self._serial)
        refused = self._scheduler.admit(
            AdmitRequest(
                request_id=name,
                attempt=1,
                model=self.ready.model,
                prompt_ids=prompt,
                sampling=SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, seed=0),
                block_hashes=chain_hashes(self._root, prompt, self.ready.block_size),
            ),
            time.monotonic(),
        )
        if refused is None:
            self._open[name] = record
        else:
            record.ended_s = self._clock()
            record.error = f"{refused.code}: {refused.message}"
            ended(record)

    def _take(self, outcome: StepOutcome, ended: Callable[[RequestRecord], None]) -> None:
        now = self._clock()
        for item in outcome.items:
            record = self._open[item.request_id]
            record.token_s.append(now)
            record.num_output += len(item.token_ids)
        for end in outcome.ended:
            record = self._open.pop(end.request_id)
            record.ended_s = now
            if end.code:
                record.error = f"{end.code}: {end.message}"
            ended(record)
