"""What the next step does: who runs, with how many tokens, on which blocks.

Continuous batching over a token budget: running decodes, chunks of running prefills, new
sequences while budget, seats and blocks last; the policy says who comes first and what shares a
step. Up to `limits.max_in_flight` plans are under way: a plan builds on the tokens that those
before it will draw. Knows nothing of results. Invariant: a sequence is never planned past its
end, nor past a token that forks or holds it.
"""

from __future__ import annotations

from xllm.master.drafting import DraftPlanner
from xllm.master.lifecycle import InstanceState
from xllm.master.lone_steps import LoneSteps
from xllm.master.making_room import RoomMaker
from xllm.master.plan_builder import PlanBuilder
from xllm.master.request import RequestState
from xllm.master.sequence import Sequence
from xllm.master.starting import SequenceStarter
from xllm.master.strategies.page_turns import PageTurns
from xllm.master.strategies.phases import StepKind
from xllm.master.strategies.step_budget import StepBudget
from xllm.master.strategies.step_model import StepShape
from xllm.master.strategies.urgency import Urgency
from xllm.protocol.step import StepPlan


class StepPlanner:
    """Turns an InstanceState into step plans."""

    def __init__(self, state: InstanceState, turns: PageTurns | None = None) -> None:
        """`turns`: of the models that share the pages; None where there is no other."""
        self._state = state
        self._turns = turns
        self._policy = state.policy
        self._builder = PlanBuilder(state)
        self._drafting = DraftPlanner(state, self._builder)
        self._room = RoomMaker(state)
        self._starter = SequenceStarter(state, self._builder, self._room, turns)
        self._lone = LoneSteps(state, self._builder, self._room, self._starter)
        self._now = 0.0

    def plan(self, now: float, is_clear: bool = True) -> StepPlan | None:
        """The next step, or None where there is nothing to compute or enough is in flight.
        `is_clear`: nothing of another model is under way."""
        state = self._state
        if len(state.steps) >= state.limits.max_in_flight or self._lone.is_under_way:
            return None
        self._now = now
        if state.is_stale:
            state.sweep()
        if state.paused:
            self._room.resume_paused(now)
        if self._turns is not None and not state.num_waiting:
            self._turns.leave(state.limits.model)
        return self._take_turns(is_clear) if state.lone else self._plan_shared(may_start=True)

    @property
    def is_lone(self) -> bool:
        """Whether a step that a request shares with nobody is under way."""
        return self._lone.is_under_way

    @property
    def is_apart(self) -> bool:
        """Whether nothing of another model may be under way with what this one has or plans."""
        return self._lone.is_under_way or (bool(self._state.lone) and self._lone.is_wanted)

    def new_number(self) -> int:
        """A sequence number that was never used."""
        return self._builder.new_number()

    def may_fork(self, leader: Sequence, child: Sequence) -> bool:
        """Whether a choice may run beside its leader from now on."""
        return self._room.can_fork(leader, child)

    def _take_turns(self, is_clear: bool) -> StepPlan | None:
        """Steps of a request alone, and of all others together."""
        lone = self._lone
        lone.is_wanted = False
        lone.join_passed()
        request = lone.next_request()
        for is_alone in (True, False) if lone.is_due(request) else (False, True):
            plan = None
            if not is_alone:
                plan = self._plan_shared(may_start=not lone.holds_back(self._now))
            elif request is not None:
                if self._state.steps or not is_clear:
                    lone.is_wanted = True
                    return None
                plan = self._plan_alone(request)
            if plan is not None:
                lone.note(plan.step, is_lone=is_alone)
                return plan
        return None

    def _plan_alone(self, request: RequestState) -> StepPlan | None:
        # As long as it may be for the sake of those that wait for it to be over.
        self._drafting.num_drafts = 0
        budget = self._budget(self._decodes(), 0)
        return self._finish(self._lone.add(request, budget))

    def _plan_shared(self, *, may_start: bool) -> StepPlan | None:
        state = self._state
        enough = self._room.grow(self._decodes())
        # Where a decode found no block, there is no room for anybody new in this step.
        may_start = may_start and enough and len(state.waiting) > 0
        if may_start:
            self._starter.begin(self._prefills())
            if state.num_offline_running or state.paused:
                self._make_room()
        return self._finish(self._fill(self._decodes(), may_start))

    def _finish(self, num_decodes: int) -> StepPlan | None:
        if self._builder.is_empty:
            return None
        plan = self._builder.finish(num_decodes)
        if self._policy.counters is not None:
            self._charge(plan)
        return plan

    def _prefills(self) -> list[Sequence]:
        """Running prefills that share steps."""
        prefilling = self._state.prefilling
        if not self._state.lone:
            return prefilling
        return [seq for seq in prefilling if not seq.request.runs_alone]

    def _decodes(self) -> list[Sequence]:
        """Running sequences that share steps and whose next one is a decode: those that decode, and
        those whose prompt's last chunk is in flight, unless its token forks, holds or ends them."""
        state = self._state
        decoding = self._drafting.plannable(state.decoding)
        if state.lone:
            decoding = [seq for seq in decoding if not seq.request.runs_alone]
        if not state.steps or not state.prefilling:
            return decoding
        ahead = [
            seq
            for seq in self._prefills()
            if seq.num_planned >= seq.num_tokens
            and seq.num_samples == 1
            and not seq.request.prefill_only
        ]
        return [*decoding, *ahead] if ahead else decoding

    def _fill(self, decodes: list[Sequence], may_start: bool) -> int:
        """Put work into the step, of the kinds that its phase allows. How many decode."""
        phases = self._policy.phases
        has_prefills = may_start or bool(self._prefills())
        kind = phases.choose(bool(decodes), has_prefills)
        num_decodes = self._drafting.num_drafts = 0
        if kind is not StepKind.PREFILL:
            num_decodes = self._add_decodes(decodes, has_prefills)
        if has_prefills and (kind is not StepKind.DECODE or self._builder.is_empty):
            self._add_prefills(decodes, num_decodes, may_start)
        if self._builder.is_empty and decodes:
            # Prefills had the step, and none could go.
            num_decodes = self._drafting.add(decodes, self._room.sitting_out)
        if kind is not StepKind.MIXED and not self._builder.is_empty:
            done = StepKind.DECODE if num_decodes else StepKind.PREFILL
            phases.note(done, has_prefills if num_decodes else bool(decodes))
        return num_decodes

    def _add_decodes(self, decodes: list[Sequence], has_prefills: bool) -> int:
        sitting_out = self._room.sitting_out
        objectives = self._policy.objectives
        if objectives is not None and decodes:
            objectives.look(self._prefills(), self._policy.waiting, len(decodes))
            if has_prefills:
                sitting_out = sitting_out | self._left_out(decodes)
        return self._drafting.add(decodes, sitting_out)

    def _left_out(self, decodes: list[Sequence]) -> set[Sequence]:
        """Decodes that will be in time without this step, where something urgent can use it."""
        objectives = self._policy.objectives
        limit = self._limit_s(decodes)
        if objectives is None or limit is None or not self._policy.model.is_ready:
            return set()
        state = self._state
        rivals = list(self._prefills())
        if state.num_running < state.limits.max_running:
            first = state.waiting.peek(self._now)
            rivals += [first] if first is not None else []
        if all(objectives.rank(seq, self._now)[0] > Urgency.URGENT for seq in rivals):
            return set()
        return {seq for seq in decodes if objectives.can_wait(seq, limit, self._now)}

    def _limit_s(self, decodes: list[Sequence]) -> float | None:
        """What the step should take at most, for the sake of those that decode."""
        limit = self._policy.max_step_s
        if limit is not None and decodes and self._policy.objectives is not None:
            own = self._policy.objectives.step_limit_s(decodes, self._now)
            limit = limit if own is None else min(limit, own)
        return limit

    def _budget(self, decodes: list[Sequence], num_decodes: int) -> StepBudget:
        """What the decodes leave of the step."""
        model = self._policy.model
        limit = self._limit_s(decodes)
        num_drafts = self._drafting.num_drafts
        if limit is not None:
            shape = StepShape(num_drafts)
            if num_decodes:
                shape.add_decodes(num_decodes, sum([seq.num_planned for seq in decodes]))
            base = model.predict(shape)
            limit = None if base is None else max(0.0, limit - base)
        tokens = self._state.limits.max_num_batched_tokens - num_decodes - num_drafts
        return StepBudget(tokens, model, limit, is_first_free=not decodes)

    def _add_prefills(self, decodes: list[Sequence], num_decodes: int, may_start: bool) -> None:
        """Running prefills, then new ones; but new online ones before running offline ones, and
        where urgency decides, all in its order."""
        objectives = self._policy.objectives
        prefilling = list(self._prefills())
        if objectives is None:
            prefilling.sort(key=lambda seq: seq.key[0])
        else:
            if not decodes:
                objectives.look(prefilling, self._policy.waiting, 0)
            ranks = {seq: objectives.rank(seq, self._now) for seq in prefilling}
            prefilling.sort(key=ranks.__getitem__)
        budget = self._budget(decodes, num_decodes)
        sitting_out = self._room.sitting_out
        has_looked = False
        for seq in prefilling:
            if may_start and (objectives is not None or (seq.key[0] and not has_looked)):
                self._starter.start_waiting(budget, seq, self._now)
                has_looked = True
            if budget.tokens <= 0:
                break
            remaining = seq.num_tokens - seq.num_planned
            if remaining <= 0 or (sitting_out and seq in sitting_out):
                continue
            share = self._starter.share(budget, seq.num_planned, remaining)
            if share <= 0:
                break
            budget.take(seq.num_planned, share)
            self._builder.add_prefill(seq, share)
        if may_start and budget.tokens > 0:
            self._starter.start_waiting(budget, None, self._now)

    def _make_room(self) -> None:
        """Take blocks from offline sequences if the next waiting one is online and needs them."""
        state = self._state
        seq = state.waiting.peek(self._now)
        if seq is None or seq.key[0]:
            return
        match = state.tables.match(seq)
        if not self._starter.is_held(seq, match):
            self._room.make_room(seq, match)

    def _charge(self, plan: StepPlan) -> None:
        """Charge tenants for the tokens that a step draws. Prompts are charged at their start."""
        counters = self._policy.counters
        assert counters is not None
        for seq, item in zip(self._state.steps[plan.step].sequences, plan.items, strict=True):
            if item.num_samples:
                counters.charge(seq.request.message.tenant, 0, item.num_samples)
