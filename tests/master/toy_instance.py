"""An instance without processes: the scheduler and the toy engine, one step at a time.

The pipeline and the sharing of prefixes are off unless asked for, so that a test sees one thing at
a time. With `max_in_flight` 2 or more a step's result reaches the scheduler after the next plans
were made.
`check()` runs after every step. `streams` collects what a router would have: tokens by (request,
attempt, choice), verified to come in order; `expected` is what the oracle says they must be.
"""

import dataclasses
from collections import deque

from xllm.config.scheduling import SchedulerSettings
from xllm.errors import EngineError
from xllm.master.limits import InstanceLimits
from xllm.master.outcome import StepOutcome
from xllm.master.scheduler import Scheduler
from xllm.master.strategies.policy import build_policy
from xllm.protocol.instance import AdmitRequest, PrefillDone, RequestEnded
from xllm.protocol.sampling import SamplingParams
from xllm.worker.loader.pooling import ModelTask
from xllm.worker.toy.executor import ToyExecutor
from xllm.worker.toy.faults import NO_FAULTS, ToyFaults
from xllm.worker.toy.stream import predict

VOCAB = 1000
PROMPT = list(range(20, 30))
"""What tests ask with where any ten tokens will do."""
SCHEDULING = (
    "strategy",
    "fairness",
    "tenant_weights",
    "preemption",
    "max_step_ms",
    "ttft_ms",
    "tpot_ms",
    "drafting",
    "draft_tokens",
)
"""What a policy is built from; all else is a limit."""


@dataclasses.dataclass
class Stream:
    tokens: list[int]
    reason: str = ""
    stop_id: int = -1
    logprobs: list = dataclasses.field(default_factory=list)


class ToyInstance:
    def __init__(self, *, faults: ToyFaults = NO_FAULTS, proposer=None, **limits) -> None:
        """`proposer`: guesses tokens in place of what the settings say."""
        scheduling = {name: limits.pop(name) for name in SCHEDULING if name in limits}
        bounds = {
            "num_blocks": 64,
            "block_size": 4,
            "max_model_len": 200,
            "eos_ids": (),
            "max_in_flight": 1,
            "share_prefixes": False,
            "num_slots": 12,
            "max_mappings": 2000,
        }
        self.limits = InstanceLimits(model="toy", vocab_size=VOCAB, **{**bounds, **limits})
        policy = build_policy(SchedulerSettings(**scheduling))
        policy.drafts = proposer or policy.drafts
        self.scheduler = Scheduler(self.limits, policy)
        self.toy = ToyExecutor(
            num_blocks=self.limits.num_blocks,
            block_size=self.limits.block_size,
            faults=faults,
            task=ModelTask(self.limits.task, self.limits.pooling),
        )
        self.requests: dict[tuple[str, int], AdmitRequest] = {}
        self.streams: dict[tuple[str, int, int], Stream] = {}
        self.ended: dict[tuple[str, int], RequestEnded] = {}
        self.scores: dict[str, dict[int, object]] = {}
        self.prefilled: list[PrefillDone] = []
        self.vectors: dict[tuple[str, int], bytes] = {}
        self.plans = []
        self.in_flight = deque()
        self.now = 100.0

    def admit(self, request_id, prompt, *, attempt=1, outputs=(), **options) -> RequestEnded | None:
        fields = {}
        for name in (
            "priority",
            "offline",
            "timeout_ms",
            "block_hashes",
            "salt",
            "model",
            "stages",
            "tenant",
            "ttft_ms",
            "tpot_ms",
            "embed",
            "packed_prompt",
            "alone",
        ):
            if name in options:
                fields[name] = options.pop(name)
        sampling = SamplingParams(**{"max_tokens": 8, "seed": 7, **options})
        request = AdmitRequest(
            request_id,
            attempt,
            fields.pop("model", "toy"),
            tuple(prompt),
            sampling,
            outputs=tuple(tuple(ids) for ids in outputs),
            **fields,
        )
        refusal = self.scheduler.admit(request, self.now)
        if refusal is None:
            self.requests[request_id, attempt] = request
        return refusal

    def take(self, outcome: StepOutcome) -> None:
        for item in outcome.items:
            key = (item.request_id, item.attempt, item.choice)
            request = self.requests[key[:2]]
            known = request.outputs[item.choice] if item.choice < len(request.outputs) else ()
            stream = self.streams.setdefault(key, Stream(list(known)))
            assert not stream.reason, f"{key} goes on after its finish reason"
            assert item.first_index == len(stream.tokens)
            stream.tokens.extend(item.token_ids)
            stream.reason, stream.stop_id = item.finish_reason, item.stop_id
            stream.logprobs.extend(item.logprobs or ())
        for ended in outcome.ended:
            key = (ended.request_id, ended.attempt)
            assert key not in self.ended, f"{key} ended twice"
            self.ended[key] = ended
        self.prefilled.extend(outcome.prefilled)
        for word in outcome.vectors:
            key = (word.request_id, word.attempt)
            assert key not in self.vectors
            self.vectors[key] = word.vector
        for scores in outcome.prompt_scores:
            found = self.scores.setdefault(scores.request_id, {})
            for position, row in enumerate(scores.logprobs, scores.first_position):
                assert position not in found
                found[position] = row

    def step(self) -> bool:
        """Plan what may be planned, settle the oldest step; False where there was nothing."""
        self.now += 0.01
        self.take(self.scheduler.expire(self.now))
        while self.plan():
            pass
        if not self.in_flight:
            return False
        self.settle()
        return True

    def plan(self) -> bool:
        """Plan a step and run it; its result is not told yet. False where there is none."""
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check()
        if plan is None:
            return False
        self.plans.append(plan)
        try:
            self.in_flight.append((plan, self.toy.execute(plan), ""))
        except RuntimeError as error:
            self.in_flight.append((plan, None, str(error)))
        return True

    def settle(self) -> None:
        """Tell the scheduler the result of the oldest step in flight."""
        plan, output, error = self.in_flight.popleft()
        if output is None:
            self.take(self.scheduler.fail_step(plan.step, EngineError.code, error))
        else:
            self.take(self.scheduler.update(output.result, output.frames, self.now))
        self.scheduler.check()

    def run(self, max_steps=5000) -> None:
        """Steps until nothing is open."""
        for _ in range(max_steps):
            if not self.step():
                break
        assert self.scheduler.num_requests == 0, self.scheduler.statistics()
        assert self.scheduler.is_idle
        stats = self.scheduler.statistics()
        assert stats.num_available_blocks == stats.num_blocks
        assert self.toy.statistics().pages.pages_broken == 0

    def expected(self, request: AdmitRequest, choice: int) -> Stream:
        """What a choice must have said when it has ended by itself."""
        sampling = request.sampling
        known = request.outputs[choice] if choice < len(request.outputs) else ()
        limits = self.limits
        end = min(limits.max_model_len, limits.num_blocks * limits.block_size + 1)
        if sampling.max_tokens is not None:
            end = min(end, len(request.prompt_ids) + sampling.max_tokens)
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops |= set(limits.eos_ids)
        tokens = list(known)
        count = max(0, end - len(request.prompt_ids) - len(tokens))
        new = predict(
            request.prompt_ids,
            sampling,
            choice,
            count,
            outputs=known,
            block_size=limits.block_size,
        )
        while True:
            if len(tokens) > sampling.min_tokens and tokens and tokens[-1] in stops:
                return Stream(tokens, "stop", tokens[-1])
            if len(request.prompt_ids) + len(tokens) >= end:
                return Stream(tokens, "length")
            tokens.append(new.pop(0))

    def verify(self, request_id, attempt=1, choices=None) -> None:
        request = self.requests[request_id, attempt]
        for choice in choices if choices is not None else range(request.sampling.n):
            got = self.streams[request_id, attempt, choice]
            want = self.expected(request, choice)
            assert (got.tokens, got.reason, got.stop_id) == (
                want.tokens,
                want.reason,
                want.stop_id,
            ), (request_id, choice)
        assert self.ended[request_id, attempt].code == ""
