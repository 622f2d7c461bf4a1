"""Blocks for sequences that need them, taken from others: who gives way, and when.

A decode that finds no block has whoever can best wait preempted; an online sequence that cannot
start has offline ones preempted, if that lets it start. What a step in flight writes can not be
taken: such a victim first sits out the steps that are planned (and so does who needs its blocks),
and is preempted once it has none in flight. Invariant: in every plan with a shortage either all
short sequences found blocks, or a victim comes a step closer to giving way: nobody waits for ever.
"""

from __future__ import annotations

from xllm.kvcache.prefix import MatchResult
from xllm.master.lifecycle import InstanceState
from xllm.master.preemption import FreedBlocks, choose_victim, order_victims
from xllm.master.sequence import Sequence, SequencePhase


class RoomMaker:
    """Moves blocks between the sequences of an InstanceState, for one plan at a time.

    `sitting_out`: running sequences that this plan leaves alone, so that they can give way."""

    def __init__(self, state: InstanceState) -> None:
        self._state = state
        self.sitting_out: set[Sequence] = set()
        # Blocks left over when a sequence starts beside others, so that these can grow.
        self._spare_blocks = max(1, state.limits.num_blocks // 100)

    def grow(self, sequences: list[Sequence]) -> bool:
        """Find a block for every one of `sequences` (decodes) that begins one, taking them from
        others if need be. Whether there were enough without."""
        state = self._state
        tables = state.tables
        self.sitting_out.clear()
        enough = True
        for seq in sequences:
            if seq.num_planned < seq.capacity or seq.num_planned + 1 >= seq.end:
                continue
            while seq.state is SequencePhase.RUNNING and not tables.grow(seq):
                enough = False
                if not self._take_from(choose_victim((*state.decoding, *state.prefilling))):
                    break
        if state.is_stale:
            state.sweep()
        return enough

    def make_room(self, seq: Sequence, match: MatchResult) -> None:
        """Offline sequences give way so that the online one `seq`, which waits, can start. Done
        before the step is planned: what is in it can no longer give way."""
        state = self._state
        if self.can_start(seq, match):
            return
        offline = [s for s in (*state.decoding, *state.prefilling) if s.key[0]]
        for victim in self._enough_victims(seq, match, offline):
            self._take_from(victim)
        if state.is_stale:
            state.sweep()

    def can_start(self, seq: Sequence, match: MatchResult) -> bool:
        """Whether a seat and blocks are there for a waiting sequence."""
        state = self._state
        if state.num_running >= state.limits.max_running:
            return False
        return state.tables.has_room(seq, match, self._spare_blocks if state.num_running else 0)

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
        """Those of `offline` that give way, as few as let `seq` start; none of them if all would
        not do."""
        state = self._state
        tables = state.tables
        num_missing = tables.num_missing(seq, match)
        if sum([len(victim.block_ids) for victim in offline]) < num_missing:
            return []
        victims: list[Sequence] = []
        freed = FreedBlocks(tables.cache.pool, match.block_ids)
        for victim in order_victims(offline):
            victims.append(victim)
            freed.add(victim.block_ids)
            num_left = state.num_running - len(victims)
            spare = self._spare_blocks if num_left else 0
            if num_left < state.limits.max_running and freed.num_blocks >= num_missing + spare:
                return victims
        return []
