"""Which decodes of a step are verified with drafts, and with how many.

Drafts take only what is left over: no block from anybody, and no more than half of the rows that
decodes leave of a step. A sequence that has a step under way is not planned ahead where its next
tokens can be guessed: it is verified once that step's token is known. What verifies drafts of it is
the last that is under way for a sequence, for nobody knows its length before that is settled.
"""

from __future__ import annotations

from xllm.master.lifecycle import InstanceState
from xllm.master.plan_builder import PlanBuilder
from xllm.master.sequence import Sequence

_PLENTY = 8
"""Blocks are taken for drafts while one in so many can still be had."""


class DraftPlanner:
    """Puts verified sequences into plans. `num_drafts`: of the plan in the making."""

    def __init__(self, state: InstanceState, builder: PlanBuilder) -> None:
        self._state = state
        self._builder = builder
        self.num_drafts = 0

    def plannable(self, decodes: list[Sequence]) -> list[Sequence]:
        """Those whose length is known, or will be once what is under way is settled."""
        if self._state.policy.drafts is None:
            return decodes
        return [seq for seq in decodes if not seq.num_drafts]

    def add(self, decodes: list[Sequence], sitting_out: set[Sequence]) -> int:
        """One or more tokens for all of `decodes` that can have them; see `add_decodes` of the
        builder. How many sequences they are."""
        self.num_drafts = 0
        proposer = self._state.policy.drafts
        if proposer is None:
            return self._builder.add_decodes(decodes, sitting_out)
        left = (self._state.limits.max_num_batched_tokens - len(decodes)) // 2
        plain: list[Sequence] = []
        num_verified = 0
        for seq in decodes:
            # The last token before its end needs no KV, and is drawn beside the drafts.
            room = min(self._state.policy.max_drafts, left, seq.end - seq.num_planned - 2)
            if sitting_out and seq in sitting_out:
                continue
            drafts = proposer.propose(seq, room) if room > 0 and seq.may_draft else ()
            if not drafts:
                plain.append(seq)
                continue
            if seq.num_in_flight:
                continue
            drafts = drafts[: self._find_room(seq, len(drafts))]
            if not drafts:
                plain.append(seq)
                continue
            self._builder.add_verified(seq, drafts)
            left -= len(drafts)
            self.num_drafts += len(drafts)
            num_verified += 1
        return num_verified + self._builder.add_decodes(plain, sitting_out)

    def _find_room(self, seq: Sequence, num_drafts: int) -> int:
        """For how many drafts behind its last token a sequence has blocks, or finds some."""
        tables = self._state.tables
        cache = tables.cache
        wanted = seq.num_planned + 1 + num_drafts
        while seq.capacity < wanted and cache.num_available * _PLENTY >= tables.num_blocks:
            if not tables.grow(seq):
                break
        return max(0, min(num_drafts, seq.capacity - seq.num_planned - 1))
