"""One instance's scheduling decisions, put together from its settings."""

from __future__ import annotations

import dataclasses

from xllm.config.scheduling import SchedulerSettings, check_scheduling, tenant_weights
from xllm.master.queue import WaitingQueue
from xllm.master.strategies.deadlines import TokenDeadlines, UrgencyQueue
from xllm.master.strategies.drafts import DraftProposer, PromptLookup
from xllm.master.strategies.fairness import FairQueue, TokenCounters
from xllm.master.strategies.phases import MixedSteps, StepPhases, decode_first, prefill_first
from xllm.master.strategies.shares import ChunkedPrefill, PrefillShare, WholePrefill
from xllm.master.strategies.step_budget import DEFAULT_LIMIT_S
from xllm.master.strategies.step_model import StepShape, StepTimeModel
from xllm.master.strategies.waiting import WaitingOrder
from xllm.protocol.step import StepPlan

LEARN_EVERY = 4


@dataclasses.dataclass(slots=True)
class SchedulingPolicy:
    """The decisions of one scheduler; some remember, so that no two schedulers share one.

    `max_step_s`: what a step should take at most while sequences decode; None: as long as it
    takes. `never_evicts`: only who fits to its end starts. `preemption`: auto, recompute or
    pause. `objectives`: set where urgency decides. `counters`: set where tenants are charged.
    `drafts`: set where tokens are guessed, at most `max_drafts` for a sequence and step."""

    phases: StepPhases
    share: PrefillShare
    waiting: WaitingOrder
    model: StepTimeModel
    max_step_s: float | None
    never_evicts: bool = False
    preemption: str = "auto"
    objectives: TokenDeadlines | None = None
    counters: TokenCounters | None = None
    drafts: DraftProposer | None = None
    max_drafts: int = 0

    def learn(self, plan: StepPlan, num_decodes: int, seconds: float) -> None:
        """A step took so long. Of steps of decodes alone, which are many and alike, a few tell
        enough."""
        only_decodes = num_decodes == len(plan.items)
        if only_decodes and self.model.is_ready and plan.step % LEARN_EVERY:
            return
        self.model.add(StepShape.of(plan), seconds)


def build_policy(settings: SchedulerSettings | None = None) -> SchedulingPolicy:
    """The decisions that settings stand for; ConfigError where they contradict each other."""
    if settings is None:
        settings = SchedulerSettings()
    check_scheduling(settings)
    model = StepTimeModel()
    phases: StepPhases = MixedSteps()
    share: PrefillShare = ChunkedPrefill()
    max_step_s: float | None = settings.max_step_ms / 1000 or DEFAULT_LIMIT_S
    waiting: WaitingOrder = WaitingQueue()
    objectives = counters = None
    if settings.strategy == "continuous":
        share, max_step_s = WholePrefill(), None
    elif settings.strategy == "prefill-first":
        phases = prefill_first()
    elif settings.strategy == "decode-first":
        phases = decode_first()
    elif settings.strategy == "slo-urgency":
        objectives = TokenDeadlines(settings.ttft_ms / 1000, settings.tpot_ms / 1000, model)
        waiting = UrgencyQueue(objectives)
    if settings.fairness == "tenant":
        waiting = FairQueue(tenant_weights(settings.tenant_weights))
        counters = waiting.counters
    return SchedulingPolicy(
        phases,
        share,
        waiting,
        model,
        max_step_s,
        settings.strategy == "zero-evict",
        settings.preemption,
        objectives,
        counters,
        PromptLookup() if settings.drafting == "prompt-lookup" else None,
        settings.draft_tokens,
    )
