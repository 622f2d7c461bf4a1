"""What the next step does: who runs, with how many tokens, on which blocks.

Continuous batching over a token budget: running decodes, chunks of running prefills, new
sequences while budget, seats and blocks last; the policy says who comes first and what shares a
step. Up to `limits.max_in_flight` plans are under way: a plan builds on the tokens that those
before it will draw. Knows nothing of results. Invariant: a sequence is never planned past its
end, nor past a token that forks or holds it.
"""

from __future__ import annotations

from xllm.kvcache.prefix import MatchResult
from xllm.master.lifecycle import InstanceState
from xllm.master.making_room import RoomMaker
from xllm.master.plan_builder import PlanBuilder
from xllm.master.prefix_sharing import MAX_HELD, MAX_PASSED, PrefixSharing
from xllm.master.sequence import Sequence
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
        self._room = RoomMaker(state)
        self._sharing = PrefixSharing(
            state.limits.block_size, state.limits.share_prefixes and state.limits.prefix_cache
        )
        self._now = 0.0

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None where there is nothing to compute or enough is in flight."""
        state = self._state
        if len(state.steps) >= state.limits.max_in_flight:
            return None
        self._now = now
        if state.is_stale:
            state.sweep()
        if state.paused:
            self._room.resume_paused(now)
        if self._turns is not None and not len(state.waiting):
            self._turns.leave(state.limits.model)
        enough = self._room.grow(self._decodes())
        # Where a decode found no block, there is no room for anybody new in this step.
        may_start = enough and len(state.waiting) > 0
        if may_start:
            self._sharing.begin(state.prefilling)
            if state.num_offline_running or state.paused:
                self._make_room()
        num_decodes = self._fill(self._decodes(), may_start)
        if self._builder.is_empty:
            return None
        plan = self._builder.finish(num_decodes)
        if self._policy.counters is not None:
            self._charge(plan)
        return plan

    def new_number(self) -> int:
        """A sequence number that was never used."""
        return self._builder.new_number()

    def may_fork(self, leader: Sequence, child: Sequence) -> bool:
        """Whether a choice may run beside its leader from now on."""
        return self._room.can_fork(leader, child)

    def _decodes(self) -> list[Sequence]:
        """Running sequences whose next step is a decode: those that decode, and those whose
        prompt's last chunk is in flight, unless its token forks, holds or ends them."""
        state = self._state
        if not state.steps or not state.prefilling:
            return state.decoding
        ahead = [
            seq
            for seq in state.prefilling
            if seq.num_planned >= seq.num_tokens
            and seq.num_samples == 1
            and not seq.request.prefill_only
        ]
        return [*state.decoding, *ahead] if ahead else state.decoding

    def _fill(self, decodes: list[Sequence], may_start: bool) -> int:
        """Put work into the step, of the kinds that its phase allows. How many decode."""
        phases = self._policy.phases
        has_prefills = may_start or bool(self._state.prefilling)
        kind = phases.choose(bool(decodes), has_prefills)
        num_decodes = 0
        if kind is not StepKind.PREFILL:
            num_decodes = self._add_decodes(decodes, has_prefills)
        if has_prefills and (kind is not StepKind.DECODE or self._builder.is_empty):
            self._add_prefills(decodes, num_decodes, may_start)
        if self._builder.is_empty and decodes:
            # Prefills had the step, and none could go.
            num_decodes = self._builder.add_decodes(decodes, self._room.sitting_out)
        if kind is not StepKind.MIXED and not self._builder.is_empty:
            done = StepKind.DECODE if num_decodes else StepKind.PREFILL
            phases.note(done, has_prefills if num_decodes else bool(decodes))
        return num_decodes

    def _add_decodes(self, decodes: list[Sequence], has_prefills: bool) -> int:
        sitting_out = self._room.sitting_out
        objectives = self._policy.objectives
        if objectives is not None and decodes:
            objectives.look(self._state.prefilling, self._policy.waiting, len(decodes))
            if has_prefills:
                sitting_out = sitting_out | self._left_out(decodes)
        return self._builder.add_decodes(decodes, sitting_out)

    def _left_out(self, decodes: list[Sequence]) -> set[Sequence]:
        """Decodes that will be in time without this step, where something urgent can use it."""
        objectives = self._policy.objectives
        limit = self._limit_s(decodes)
        if objectives is None or limit is None or not self._policy.model.is_ready:
            return set()
        state = self._state
        rivals = list(state.prefilling)
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
        if limit is not None:
            shape = StepShape()
            if num_decodes:
                shape.add_decodes(num_decodes, sum([seq.num_planned for seq in decodes]))
            base = model.predict(shape)
            limit = None if base is None else max(0.0, limit - base)
        tokens = self._state.limits.max_num_batched_tokens - num_decodes
        return StepBudget(tokens, model, limit, is_first_free=not decodes)

    def _add_prefills(self, decodes: list[Sequence], num_decodes: int, may_start: bool) -> None:
        """Running prefills, then new ones; but new online ones before running offline ones, and
        where urgency decides, all in its order."""
        objectives = self._policy.objectives
        prefilling = list(self._state.prefilling)
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
                self._start_waiting(budget, seq)
                has_looked = True
            if budget.tokens <= 0:
                break
            remaining = seq.num_tokens - seq.num_planned
            if remaining <= 0 or (sitting_out and seq in sitting_out):
                continue
            share = self._share(budget, seq.num_planned, remaining)
            if share <= 0:
                break
            budget.take(seq.num_planned, share)
            self._builder.add_prefill(seq, share)
        if may_start and budget.tokens > 0:
            self._start_waiting(budget, None)

    def _comes_before(self, running: Sequence, seq: Sequence) -> bool:
        """Whether a running prefill goes before one that waits. Without urgency it is an offline
        one."""
        objectives = self._policy.objectives
        if objectives is None:
            return seq.key[0]
        return objectives.rank(running, self._now) < objectives.rank(seq, self._now)

    def _share(self, budget: StepBudget, start: int, remaining: int) -> int:
        allowed = budget.allowed(start, remaining)
        return self._policy.share.share(remaining, allowed, budget.num_prefills)

    def _make_room(self) -> None:
        """Take blocks from offline sequences if the next waiting one is online and needs them."""
        state = self._state
        seq = state.waiting.peek(self._now)
        if seq is None or seq.key[0]:
            return
        match = state.tables.match(seq)
        if not self._sharing.is_held(seq, match):
            self._room.make_room(seq, match)

    def _start_waiting(self, budget: StepBudget, before: Sequence | None) -> None:
        """Start sequences in the queue's order, those that go before the running prefill `before`
        if it is given; the first that cannot start ends it, so that large requests are not
        overtaken for ever. Those that wait for a leader's prefix are passed, so many times."""
        state = self._state
        held: list[Sequence] = []
        while budget.tokens > 0:
            seq = state.waiting.peek(self._now)
            if seq is None or state.num_running >= state.limits.max_running:
                break
            if before is not None and self._comes_before(before, seq):
                break
            match = state.tables.match(seq)
            if self._sharing.is_held(seq, match):
                if seq.num_passed >= MAX_PASSED or len(held) >= MAX_HELD:
                    break
                held.append(state.waiting.pop())
                continue
            if not self._has_turn(seq, match):
                break
            start = len(match.block_ids) * state.limits.block_size
            share = self._share(budget, start, seq.num_tokens - start)
            if share <= 0:
                break
            state.waiting.pop()
            budget.take(start, share)
            self._start(seq, match, share)
            if self._turns is not None:
                self._turns.leave(state.limits.model)
            for follower in held:
                follower.num_passed += 1
        for follower in held:
            state.waiting.put_back(follower)

    def _has_turn(self, seq: Sequence, match: MatchResult) -> bool:
        """Whether the next waiting sequence can start, and no other model waits for its pages."""
        turns, model = self._turns, self._state.limits.model
        if turns is not None and not turns.may_start(model):
            return False
        if self._room.can_start(seq, match):
            return True
        if turns is not None and self._room.lacks_blocks(seq, match):
            turns.lacks(model)
        return False

    def _start(self, seq: Sequence, match: MatchResult, share: int) -> None:
        """A sequence from the queue runs from now on, with so many tokens in this step."""
        state = self._state
        state.tables.start(seq, match)
        self._builder.introduce(seq)
        state.run(seq)
        seq.num_passed = 0
        request = seq.request
        if request.cached_tokens < 0:
            request.cached_tokens = min(seq.num_computed, seq.num_prompt)
            if self._policy.counters is not None:
                computed = seq.num_tokens - seq.num_computed
                self._policy.counters.charge(request.message.tenant, computed, 0)
        self._sharing.add_leader(seq)
        self._builder.add_prefill(seq, share)

    def _charge(self, plan: StepPlan) -> None:
        """Charge tenants for the tokens that a step draws. Prompts are charged at their start."""
        counters = self._policy.counters
        assert counters is not None
        for seq, item in zip(self._state.steps[plan.step].sequences, plan.items, strict=True):
            if item.num_samples:
                counters.charge(seq.request.message.tenant, 0, item.num_samples)
