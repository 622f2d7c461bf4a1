"""What the next step does: who runs, with how many tokens, on which blocks.

Continuous batching over a token budget: running decodes first, then chunks of running prefills,
then new sequences while budget, seats and blocks last. Up to `limits.max_in_flight` plans are
under way: a plan builds on the tokens that those before it will draw. Knows nothing of results.
Invariant: a sequence is never planned past its end, nor past a token that forks or holds it.
"""

from __future__ import annotations

from xllm.kvcache.prefix import MatchResult
from xllm.master.lifecycle import InstanceState
from xllm.master.making_room import RoomMaker
from xllm.master.plan_builder import PlanBuilder
from xllm.master.prefix_sharing import MAX_HELD, MAX_PASSED, PrefixSharing
from xllm.master.sequence import Sequence
from xllm.master.strategy import PrefillStrategy
from xllm.protocol.step import StepPlan


class StepPlanner:
    """Turns an InstanceState into step plans."""

    def __init__(self, state: InstanceState, strategy: PrefillStrategy) -> None:
        self._state = state
        self._strategy = strategy
        self._builder = PlanBuilder(state)
        self._room = RoomMaker(state)
        self._sharing = PrefixSharing(
            state.limits.block_size, state.limits.share_prefixes and state.limits.prefix_cache
        )

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None where there is nothing to compute or enough is in flight."""
        state = self._state
        if len(state.steps) >= state.limits.max_in_flight:
            return None
        if state.is_stale:
            state.sweep()
        enough = self._room.grow(self._decodes())
        # Where a decode found no block, there is no room for anybody new in this step.
        may_start = enough and len(state.waiting) > 0
        if may_start:
            self._sharing.begin(state.prefilling)
            if state.num_offline_running:
                self._make_room()
        num_decodes = self._builder.add_decodes(self._decodes(), self._room.sitting_out)
        budget = state.limits.max_num_batched_tokens - num_decodes
        num_prefills = 0
        if state.prefilling:
            budget, num_prefills = self._add_prefills(budget)
        if may_start and budget > 0:
            self._start_waiting(budget, num_prefills)
        if self._builder.is_empty:
            return None
        return self._builder.finish(num_decodes)

    def new_number(self) -> int:
        """A sequence number that was never used."""
        return self._builder.new_number()

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

    def _add_prefills(self, budget: int) -> tuple[int, int]:
        num_prefills = 0
        sitting_out = self._room.sitting_out
        for seq in self._state.prefilling:
            if budget <= 0:
                break
            remaining = seq.num_tokens - seq.num_planned
            if remaining <= 0 or (sitting_out and seq in sitting_out):
                continue
            share = self._strategy.share(remaining, budget, num_prefills)
            if share <= 0:
                break
            self._builder.add_prefill(seq, share)
            budget -= share
            num_prefills += 1
        return budget, num_prefills

    def _make_room(self) -> None:
        """Take blocks from offline sequences if the next waiting one is online and needs them."""
        state = self._state
        seq = state.waiting.peek()
        if seq is None or seq.key[0]:
            return
        match = state.tables.match(seq)
        if not self._sharing.is_held(seq, match):
            self._room.make_room(seq, match)

    def _start_waiting(self, budget: int, num_prefills: int) -> None:
        """Start sequences in the queue's order; the first that cannot start ends it, so that
        large requests are not overtaken for ever. Those that wait for a leader's prefix are
        passed, so many times."""
        state = self._state
        held: list[Sequence] = []
        while budget > 0:
            seq = state.waiting.peek()
            if seq is None or state.num_running >= state.limits.max_running:
                break
            match = state.tables.match(seq)
            if self._sharing.is_held(seq, match):
                if seq.num_passed >= MAX_PASSED or len(held) >= MAX_HELD:
                    break
                held.append(state.waiting.pop())
                continue
            if not self._room.can_start(seq, match):
                break
            remaining = seq.num_tokens - len(match.block_ids) * state.limits.block_size
            share = self._strategy.share(remaining, budget, num_prefills)
            if share <= 0:
                break
            state.waiting.pop()
            self._start(seq, match, share)
            budget -= share
            num_prefills += 1
            for follower in held:
                follower.num_passed += 1
        for follower in held:
            state.waiting.push(follower)

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
        self._sharing.add_leader(seq)
        self._builder.add_prefill(seq, share)
