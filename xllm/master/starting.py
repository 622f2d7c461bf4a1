"""Which waiting sequences join a step, and with how many tokens.

In the queue's order, while seats, blocks and the step's budget last. Where several models share the
pages, only in the model's turn. Never decides what else the step holds.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.kvcache.prefix import MatchResult
from xllm.master.lifecycle import InstanceState
from xllm.master.making_room import RoomMaker
from xllm.master.plan_builder import PlanBuilder
from xllm.master.prefix_sharing import MAX_HELD, MAX_PASSED, PrefixSharing
from xllm.master.sequence import Sequence
from xllm.master.strategies.page_turns import PageTurns
from xllm.master.strategies.step_budget import StepBudget


class SequenceStarter:
    """Moves sequences from the queue into the plan that `builder` makes. `turns`: of the models
    that share the pages; None where there is no other."""

    def __init__(
        self,
        state: InstanceState,
        builder: PlanBuilder,
        room: RoomMaker,
        turns: PageTurns | None,
    ) -> None:
        self._state = state
        self._builder = builder
        self._room = room
        self._turns = turns
        limits = state.limits
        self._sharing = PrefixSharing(
            limits.block_size, limits.share_prefixes and limits.prefix_cache
        )

    def begin(self, prefilling: Iterable[Sequence]) -> None:
        """A new plan; what these prefills are about to seal is worth waiting for."""
        self._sharing.begin(prefilling)

    def is_held(self, seq: Sequence, match: MatchResult) -> bool:
        """Whether a waiting sequence is to wait for another one's prefix."""
        return self._sharing.is_held(seq, match)

    def share(self, budget: StepBudget, start: int, remaining: int) -> int:
        """How many tokens of a prefill that lacks `remaining` join the step."""
        allowed = budget.allowed(start, remaining)
        return self._state.policy.share.share(remaining, allowed, budget.num_prefills)

    def start_waiting(self, budget: StepBudget, before: Sequence | None, now: float) -> None:
        """Start sequences in the queue's order, those that go before the running prefill `before`
        if it is given; the first that cannot start ends it, so that large requests are not
        overtaken for ever. Those that wait for a leader's prefix are passed, so many times."""
        state = self._state
        held: list[Sequence] = []
        while budget.tokens > 0:
            seq = state.waiting.peek(now)
            if seq is None or state.num_running >= state.limits.max_running:
                break
            if before is not None and self._comes_before(before, seq, now):
                break
            match = state.tables.match(seq)
            if self._sharing.is_held(seq, match):
                if seq.num_passed >= MAX_PASSED or len(held) >= MAX_HELD:
                    break
                held.append(state.waiting.pop())
                continue
            share = self.share_of(seq, match, budget)
            if share <= 0:
                break
            state.waiting.pop()
            self.start(seq, match, share, budget)
            for follower in held:
                follower.num_passed += 1
        for follower in held:
            state.waiting.put_back(follower)

    def share_of(self, seq: Sequence, match: MatchResult, budget: StepBudget) -> int:
        """With how many tokens the next waiting sequence may start now; 0: it may not."""
        if not self._has_turn(seq, match):
            return 0
        start = len(match.block_ids) * self._state.limits.block_size
        return self.share(budget, start, seq.num_tokens - start)

    def start(self, seq: Sequence, match: MatchResult, share: int, budget: StepBudget) -> None:
        """A sequence that waited, and has left its queue, runs from now on, with so many tokens in
        this step."""
        state = self._state
        budget.take(len(match.block_ids) * state.limits.block_size, share)
        state.tables.start(seq, match)
        self._builder.introduce(seq)
        state.run(seq)
        seq.num_passed = 0
        request = seq.request
        if request.cached_tokens < 0:
            request.cached_tokens = min(seq.num_computed, seq.num_prompt)
            counters = state.policy.counters
            if counters is not None:
                computed = seq.num_tokens - seq.num_computed
                counters.charge(request.message.tenant, computed, 0)
        self._sharing.add_leader(seq)
        self._builder.add_prefill(seq, share)
        if self._turns is not None:
            self._turns.leave(state.limits.model)

    def _comes_before(self, running: Sequence, seq: Sequence, now: float) -> bool:
        """Whether a running prefill goes before one that waits. Without urgency it is an offline
        one."""
        objectives = self._state.policy.objectives
        if objectives is None:
            return seq.key[0]
        return objectives.rank(running, now) < objectives.rank(seq, now)

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
