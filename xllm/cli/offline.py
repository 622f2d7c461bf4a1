"""One model in this process, without sockets: the same scheduler, executor, request states and
text as the service's, called one after the other.

Decides nothing of its own. One request at a time.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator

from xllm.config.settings import Settings
from xllm.errors import EngineError, XllmError, error_from_code
from xllm.master.limits import InstanceLimits
from xllm.master.outcome import StepOutcome
from xllm.master.scheduler import Scheduler
from xllm.master.strategies.policy import build_policy
from xllm.protocol.generation import RequestFailed, RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.instance import AdmitRequest, CancelRequest
from xllm.protocol.records import InstanceRecord
from xllm.protocol.step import WorkerReady
from xllm.router.front import Tenant
from xllm.router.intake import Intake
from xllm.router.state.instructions import Instruction, SendTo, Wish
from xllm.router.state.request import RequestLife
from xllm.router.text.model import load_text_model
from xllm.worker.factory import make_executor

_ROUTE = (("both", "local"),)


class OfflineEngine:
    """A loaded model. `close` it."""

    def __init__(self, settings: Settings, progress: Callable[[int, int], None]) -> None:
        text = load_text_model(settings.model.path)
        self._timeout_s = settings.router.timeout_s
        self._intake = Intake(settings.model.name, text, settings.router)
        # Here is one process, whatever the settings say of an instance's.
        alone = dataclasses.replace(settings.master, num_workers=1)
        self._executor = make_executor(dataclasses.replace(settings, master=alone))
        try:
            ready = self._executor.load(progress)
        except BaseException:
            self._executor.close()
            raise
        self.can_chat = text.has_template
        self._intake.learn(_record(settings, ready))
        limits = InstanceLimits.from_ready(ready, settings.scheduler)
        self._scheduler = Scheduler(limits, build_policy(settings.scheduler))

    def answer(self, request: SubmitRequest) -> Iterator[TokenDelta | RequestFinished]:
        """Deltas (where the request streams), then RequestFinished; raises what failed it.

        Leaving the iteration early stops the request."""
        self._intake.check(request)
        now = time.monotonic()
        seed = secrets.randbits(64)
        deadline = now + (request.timeout_ms / 1000 or self._timeout_s)
        spec = self._intake.prepare(request, Tenant(), secrets.token_hex(16), seed, deadline)
        text = self._intake.text
        outputs = [text.output(spec.sampling, spec.prompt_ids) for _ in range(spec.sampling.n)]
        state = RequestLife(spec, outputs)
        todo: deque[Instruction] = deque(state.place(_ROUTE, now))
        try:
            while True:
                while todo:
                    instruction = todo.popleft()
                    if isinstance(instruction, RequestFailed):
                        raise error_from_code(
                            instruction.code, instruction.message, instruction.param
                        )
                    if isinstance(instruction, TokenDelta | RequestFinished):
                        yield instruction
                    else:
                        todo.extend(self._carry_out(instruction, state))
                if state.ended:
                    return
                todo.extend(self._step(state))
        finally:
            self._scheduler.cancel(spec.request_id, state.attempt)

    def close(self) -> None:
        """Release the device's memory."""
        self._executor.close()

    def _carry_out(self, instruction: Instruction, state: RequestLife) -> list[Instruction]:
        now = time.monotonic()
        if instruction is Wish.FLUSH:
            return list(state.flush())
        if instruction is Wish.PLACE:
            return list(state.unplaceable(now))
        assert isinstance(instruction, SendTo)
        message = instruction.message
        if isinstance(message, CancelRequest):
            self._scheduler.cancel(message.request_id, message.attempt, message.choice)
            return []
        assert isinstance(message, AdmitRequest)
        refused = self._scheduler.admit(message, now)
        return list(state.engine_ended(refused)) if refused is not None else []

    def _step(self, state: RequestLife) -> list[Instruction]:
        """One step of the engine, or the end of requests whose time is over."""
        scheduler = self._scheduler
        now = time.monotonic()
        said = self._tell(state, scheduler.expire(now))
        plan = scheduler.schedule(now)
        if plan is None:
            if not said:
                raise EngineError("the scheduler has nothing to do, and the request is open")
            return said
        try:
            output = self._executor.execute(plan)
        except XllmError as error:
            return said + self._tell(
                state, scheduler.fail_step(plan.step, error.code, error.message)
            )
        outcome = scheduler.update(output.result, output.frames, time.monotonic())
        return said + self._tell(state, outcome)

    def _tell(self, state: RequestLife, outcome: StepOutcome) -> list[Instruction]:
        said: list[Instruction] = []
        for scores in outcome.prompt_scores:
            said += state.prompt_word(scores)
        for item in outcome.items:
            said += state.tokens(item)
        for word in outcome.ended:
            said += state.engine_ended(word)
        return said


def _record(settings: Settings, ready: WorkerReady) -> InstanceRecord:
    return InstanceRecord(
        name="local",
        incarnation="",
        endpoint="",
        bus_endpoint="",
        model=settings.model.name,
        model_path=settings.model.path,
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        block_size=ready.block_size,
        num_blocks=ready.num_blocks,
        eos_ids=ready.eos_ids,
        revision=ready.revision,
        task=ready.task,
        embedding_size=ready.embedding_size,
    )
