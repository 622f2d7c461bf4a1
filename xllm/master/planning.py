"""What the next step does: who runs, with how many tokens, on which blocks.

Continuous batching over a token budget: running decodes first, then chunks of running prefills,
then new sequences while budget, seats and blocks last. A decode that finds no block preempts
whoever can best wait; an online sequence that cannot start preempts offline ones, if that lets
it start. Knows nothing of results. Invariants: a sequence has at most one step in flight and is
never planned past its end; a plan names new sequences in full once and then only what changes.
"""

from __future__ import annotations

from xllm.kvcache.prefix import MatchResult
from xllm.master.lifecycle import InstanceState, PendingFork, StepInFlight
from xllm.master.preemption import FreedBlocks, choose_victim, order_victims
from xllm.master.sequence import Sequence, SequencePhase
from xllm.master.strategy import PrefillStrategy
from xllm.protocol.step import ItemKind, NewSequence, StepItem, StepPlan

_DECODE = int(ItemKind.DECODE)
_PREFILL = int(ItemKind.PREFILL)


class StepPlanner:
    """Turns an InstanceState into step plans."""

    def __init__(self, state: InstanceState, strategy: PrefillStrategy) -> None:
        self._state = state
        self._strategy = strategy
        self._next_step = 1
        self._next_number = 1
        self._items: list[StepItem] = []
        self._sequences: list[Sequence] = []
        self._new: list[NewSequence] = []
        limits = state.limits
        # Blocks left over when a sequence starts beside others, so that these can grow.
        self._spare_blocks = max(1, limits.num_blocks // 100)

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None where there is nothing to compute."""
        state = self._state
        self._items, self._sequences, self._new = [], [], []
        num_preempted = state.num_preemptions
        if state.is_stale:
            state.sweep()
        self._grow_decodes()
        num_shortages = state.num_preemptions - num_preempted
        if state.num_offline_running and not num_shortages:
            self._make_room()
        num_decodes = self._add_decodes()
        budget = state.limits.max_num_batched_tokens - num_decodes
        num_prefills = 0
        if state.prefilling:
            budget, num_prefills = self._add_prefills(budget)
        # Where a decode found no block, there is no room for anybody new in this step.
        if len(state.waiting) and budget > 0 and not num_shortages:
            self._start_waiting(budget, num_prefills)
        if not self._items:
            return None
        return self._finish_plan(num_decodes)

    def new_number(self) -> int:
        """A sequence number that was never used."""
        number = self._next_number
        self._next_number += 1
        return number

    def _grow_decodes(self) -> None:
        """Find a block for every decode that begins one, taking them from others if need be."""
        state = self._state
        tables = state.tables
        for seq in state.decoding:
            if seq.num_tokens <= seq.capacity or seq.num_in_flight:
                continue
            while seq.state is SequencePhase.RUNNING and not tables.grow(seq):
                victim = choose_victim((*state.decoding, *state.prefilling))
                if victim is None:
                    break
                state.preempt(victim)
        if state.is_stale:
            state.sweep()

    def _add_decodes(self) -> int:
        items, sequences = self._items, self._sequences
        for seq in self._state.decoding:
            start = seq.num_tokens - 1
            if seq.num_in_flight or start >= seq.capacity:
                continue
            num_blocks = len(seq.block_ids)
            if num_blocks == seq.num_sent_blocks:
                items.append(StepItem(seq.number, _DECODE, start, 1))
            else:
                fresh = tuple(seq.block_ids[seq.num_sent_blocks :])
                seq.num_sent_blocks = num_blocks
                items.append(StepItem(seq.number, _DECODE, start, 1, fresh))
            seq.num_in_flight = 1
            sequences.append(seq)
        return len(items)

    def _add_prefills(self, budget: int) -> tuple[int, int]:
        num_prefills = 0
        for seq in self._state.prefilling:
            if budget <= 0:
                break
            if seq.num_in_flight:
                continue
            remaining = seq.num_tokens - seq.num_computed
            share = self._strategy.share(remaining, budget, num_prefills)
            if share <= 0:
                break
            self._add_prefill(seq, share)
            budget -= share
            num_prefills += 1
        return budget, num_prefills

    def _make_room(self) -> None:
        """Offline sequences give way so that the online one at the head of the queue can start.
        Done before the decodes are planned: what is in the step can no longer give way."""
        state = self._state
        seq = state.waiting.peek()
        if seq is None or seq.key[0]:
            return
        match = state.tables.match(seq)
        if self._can_start(seq, match):
            return
        offline = [s for s in (*state.decoding, *state.prefilling) if s.key[0]]
        for victim in self._enough_victims(seq, match, offline):
            state.preempt(victim)
        if state.is_stale:
            state.sweep()

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

    def _can_start(self, seq: Sequence, match: MatchResult) -> bool:
        state = self._state
        if state.num_running >= state.limits.max_running:
            return False
        return state.tables.has_room(seq, match, self._spare_blocks if state.num_running else 0)

    def _start_waiting(self, budget: int, num_prefills: int) -> None:
        """Start sequences in the queue's order; the first that cannot start ends it, so that
        large requests are not overtaken for ever."""
        state = self._state
        size = state.limits.block_size
        while budget > 0:
            seq = state.waiting.peek()
            if seq is None or state.num_running >= state.limits.max_running:
                return
            match = state.tables.match(seq)
            if not self._can_start(seq, match):
                return
            remaining = seq.num_tokens - len(match.block_ids) * size
            share = self._strategy.share(remaining, budget, num_prefills)
            if share <= 0:
                return
            state.waiting.pop()
            state.tables.start(seq, match)
            seq.number = self.new_number()
            state.run(seq)
            request = seq.request
            if request.cached_tokens < 0:
                request.cached_tokens = min(seq.num_computed, seq.num_prompt)
            self._introduce(seq)
            self._add_prefill(seq, share)
            budget -= share
            num_prefills += 1

    def _introduce(self, seq: Sequence) -> None:
        seq.num_sent_blocks = len(seq.block_ids)
        self._new.append(
            NewSequence(
                seq.number,
                seq.prompt_ids,
                tuple(seq.output),
                seq.request.sampling,
                seq.choice,
                tuple(seq.block_ids),
                -1,
                seq.request.stop_tuple,
                seq.request.message.model,
                seq.request.message.adapter,
            )
        )

    def _add_prefill(self, seq: Sequence, share: int) -> None:
        start = seq.num_computed
        is_last = start + share == seq.num_tokens
        scores = seq.scores_prompt and start + 1 < seq.num_prompt
        num_samples = seq.num_samples if is_last else 0
        self._items.append(StepItem(seq.number, _PREFILL, start, share, (), num_samples, scores))
        seq.num_in_flight = 1
        self._sequences.append(seq)

    def _finish_plan(self, num_decodes: int) -> StepPlan:
        state = self._state
        forgotten = state.forgotten
        state.forgotten = []
        forks = state.pending_forks
        copies: list[tuple[int, int]] = []
        if forks:
            state.pending_forks = []
            copies = [fork.copy for fork in forks if fork.copy is not None]
            self._new[:0] = [_fork_message(fork) for fork in forks]
            # A worker forgets before it learns: parents stay until their forks are known.
            parents = {fork.parent_number for fork in forks}
            state.forgotten = [number for number in forgotten if number in parents]
            forgotten = [number for number in forgotten if number not in parents]
        plan = StepPlan(
            self._next_step,
            tuple(self._items),
            tuple(self._new),
            tuple(forgotten),
            tuple(copies),
            state.limits.model,
        )
        self._next_step += 1
        state.steps[plan.step] = StepInFlight(
            plan,
            self._sequences,
            [fork.child for fork in forks],
            [source for source, _ in copies],
            num_decodes,
        )
        return plan


def _fork_message(fork: PendingFork) -> NewSequence:
    child = fork.child
    return NewSequence(
        child.number,
        (),
        tuple(child.output),
        child.request.sampling,
        child.choice,
        fork.block_ids,
        fork.parent_number,
        child.request.stop_tuple,
        child.request.message.model,
        child.request.message.adapter,
    )
