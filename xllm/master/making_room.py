"""Blocks for sequences that need them, taken from others: who gives way, and when.

A decode that finds no block has whoever can best wait preempted; an online sequence that cannot
start has offline ones preempted, if that lets it start. What a step in flight writes can not be
taken: such a victim first sits out the steps that are planned (and so does who needs its blocks),
and is preempted once it has none in flight. Invariant: in every plan with a shortage either all
short sequences found blocks, or a victim comes a step closer to giving way: nobody waits for ever.

Where only a seat is wanted, an offline sequence may be paused and keep its blocks; paused ones
are the first to lose theirs when blocks are wanted. Under zero eviction nobody is a victim: who
lacks a block waits for the next step.
"""

from __future__ import annotations

from xllm.kvcache.prefix import MatchResult
from xllm.master.lifecycle import InstanceState
from xllm.master.preemption import FreedBlocks, choose_victim, order_paused, order_victims
from xllm.master.sequence import Sequence, SequencePhase
from xllm.master.strategies.foresight import Foresight
from xllm.master.strategies.keeping import GivingWay, keeps_pages
from xllm.master.strategies.zero_evict import blocks_at_end


class RoomMaker:
    """Moves blocks between the sequences of an InstanceState, for one plan at a time.

    `sitting_out`: running sequences that this plan leaves alone, so that they can give way."""

    def __init__(self, state: InstanceState) -> None:
        self._state = state
        self.sitting_out: set[Sequence] = set()
        # Blocks left over when a sequence starts beside others, so that these can grow.
        self._spare_blocks = max(1, state.limits.num_blocks // 100)
        self._foresight = Foresight(state.tables, state.limits.block_size)

    def grow(self, sequences: list[Sequence]) -> bool:
        """Find a block for every one of `sequences` (decodes) that begins one, taking them from
        others if need be. Whether there were enough without."""
        state = self._state
        tables = state.tables
        self.sitting_out.clear()
        enough = True
        num_stuck = 0
        soon: list[Sequence] = []
        for seq in sequences:
            left = seq.capacity - seq.num_planned
            if left > 1 or seq.num_planned + 1 >= seq.end:
                continue
            if left == 1:
                if seq.num_planned + 2 < seq.end:
                    soon.append(seq)
                continue
            while seq.state is SequencePhase.RUNNING and not tables.grow(seq):
                enough = False
                if state.policy.never_evicts and not self._is_stuck(sequences, num_stuck):
                    num_stuck += 1
                    break
                running = (*state.decoding, *state.prefilling)
                if not self._take_from(choose_victim(state.paused or running)):
                    break
        # What is needed now comes before what is needed soon.
        for seq in soon:
            if enough and seq.state is SequencePhase.RUNNING:
                tables.grow_ahead(seq)
        if state.is_stale:
            state.sweep()
        return enough

    def make_room(self, seq: Sequence, match: MatchResult) -> None:
        """Offline sequences give way so that the online one `seq`, which waits, can start. Done
        before the step is planned: what is in it can no longer give way."""
        state = self._state
        if state.policy.never_evicts or self.can_start(seq, match):
            return
        running = [s for s in (*state.decoding, *state.prefilling) if s.key[0]]
        victims = self._enough_victims(seq, match, running)
        if len(victims) == 1 and self._pauses(victims[0], seq, match):
            if victims[0].num_in_flight:
                self.sitting_out.add(victims[0])
            else:
                state.pause(victims[0])
        else:
            for victim in victims:
                self._take_from(victim)
        if state.is_stale:
            state.sweep()

    def resume_paused(self, now: float) -> None:
        """Paused sequences take free seats, the earliest first, unless an online one waits."""
        state = self._state
        first = state.waiting.peek(now)
        if first is not None and not first.key[0]:
            return
        for seq in sorted(state.paused, key=lambda one: one.key):
            if state.num_running >= state.limits.max_running:
                return
            state.resume(seq)

    def can_start(self, seq: Sequence, match: MatchResult) -> bool:
        """Whether a seat and blocks are there for a waiting sequence."""
        state = self._state
        if state.num_running >= state.limits.max_running:
            return False
        if state.policy.never_evicts:
            return self._foresight.may_start(
                seq, match.block_ids, match.num_unheld, state.decoding, state.prefilling
            )
        return state.tables.has_room(seq, match, self._spare_blocks if state.num_running else 0)

    def lacks_blocks(self, seq: Sequence, match: MatchResult) -> bool:
        """Whether a waiting sequence that cannot start has a seat and a slot: it is blocks that it
        waits for."""
        state = self._state
        return state.num_running < state.limits.max_running and state.tables.has_slot(seq)

    def can_fork(self, leader: Sequence, child: Sequence) -> bool:
        """Whether a seat is there for a choice that `leader` has computed the prompt for, and,
        under zero eviction, blocks to its end."""
        state = self._state
        if state.num_running >= state.limits.max_running:
            return False
        if not state.policy.never_evicts:
            return True
        shared = leader.block_ids[: leader.num_computed // state.limits.block_size]
        # The leader has just left the prefills; a fork has not begun to use its blocks.
        going = [s for s in state.decoding if s.state is SequencePhase.RUNNING]
        rest = [s for s in state.prefilling if s.is_prefilling and s.state is SequencePhase.RUNNING]
        return self._foresight.may_start(child, shared, 0, going, rest)

    def _is_stuck(self, sequences: list[Sequence], num_stuck: int) -> bool:
        """Whether nothing at all could run for want of blocks. Foresight excludes it; it is
        what eviction is left for."""
        state = self._state
        return not state.steps and not state.prefilling and num_stuck + 1 >= len(sequences)

    def _pauses(self, victim: Sequence, seq: Sequence, match: MatchResult) -> bool:
        """Whether a victim keeps its blocks: if it is a seat that `seq` lacks, and they are
        cheaper kept than computed again."""
        state = self._state
        tables = state.tables
        if state.policy.preemption == "recompute":
            return False
        if tables.num_missing(seq, match) + self._spare_blocks > 0 or not tables.has_slot(seq):
            return False
        if state.policy.preemption == "pause":
            return True
        size = state.limits.block_size
        others = [s for s in (*state.decoding, *state.prefilling) if s is not victim]
        growth = [max(0, blocks_at_end(s.end, size) - len(s.block_ids)) for s in others]
        wanted = blocks_at_end(seq.end, size) - len(match.block_ids) + match.num_unheld
        num_short = sum(growth) + wanted - tables.cache.num_available
        refs = tables.cache.pool.refs
        num_own = sum(refs(block_id) == 1 for block_id in victim.block_ids)
        tokens = [s.num_tokens for s in others] or [victim.num_tokens]
        one = GivingWay(victim.num_computed, num_own, num_short, sum(tokens) // len(tokens))
        return keeps_pages(one, state.policy.model, size)

    def _take_from(self, victim: Sequence) -> bool:
        """Preempt a victim now (True), or have it sit out until it can be."""
        if victim.num_in_flight:
            self.sitting_out.add(victim)
            return False
        self._state.preempt(victim)
        return True

    def _enough_victims(
        self, seq: Sequence, match: MatchResult, offline: list[Sequence]
    ) -> list[Sequence]:
        """Those of `offline`, or paused, that give way, as few as let `seq` start; none of them
        if all would not do."""
        state = self._state
        paused = state.paused
        tables = state.tables
        num_missing = tables.num_missing(seq, match)
        if sum([len(victim.block_ids) for victim in (*paused, *offline)]) < num_missing:
            return []
        victims: list[Sequence] = []
        freed = FreedBlocks(tables.cache.pool, match.block_ids)
        num_seated = 0
        # Paused ones have no seat to give: they come first, and only if it is blocks or slots
        # that lack.
        lacks_memory = num_missing + self._spare_blocks > 0 or not tables.has_slot(seq)
        idle = order_paused(paused) if lacks_memory else []
        for victim in (*idle, *order_victims(offline)):
            victims.append(victim)
            freed.add(victim.block_ids)
            num_seated += victim.state is SequencePhase.RUNNING
            num_left = state.num_running - num_seated
            spare = self._spare_blocks if num_left else 0
            has_memory = freed.num_blocks >= num_missing + spare and tables.has_slot(seq, victims)
            if num_left < state.limits.max_running and has_memory:
                return victims
        return []
