"""A plan in the making: items, new sequences, what the worker can forget, copies.

Carries out what planning decided and keeps each sequence's books of it: the positions that are
planned, the blocks that the worker was told of, the steps in flight. Invariant: a plan names a new
sequence in full once and then only what changes.

An item may begin where the master's knowledge ends: the worker runs plans in order and keeps the
histories, so a decode whose token is still being drawn is told by its position alone.
"""

from __future__ import annotations

from xllm.master.lifecycle import InstanceState, PendingFork, StepInFlight
from xllm.master.sequence import Sequence
from xllm.protocol.step import ItemKind, ItemOptions, NewSequence, StepItem, StepPlan

_DECODE = int(ItemKind.DECODE)
_PREFILL = int(ItemKind.PREFILL)
_VERIFY = int(ItemKind.VERIFY)


class PlanBuilder:
    """Makes one plan after another: `add_...`, then `finish` (or nothing was added)."""

    def __init__(self, state: InstanceState) -> None:
        self._state = state
        self._next_step = 1
        self._next_number = 1
        self._clear()

    @property
    def is_empty(self) -> bool:
        """Whether nothing would be computed."""
        return not self._items

    def new_number(self) -> int:
        """A sequence number that was never used."""
        number = self._next_number
        self._next_number += 1
        return number

    def add_decodes(self, sequences: list[Sequence], sitting_out: set[Sequence]) -> int:
        """One token each for all of `sequences` that have a block for it and do not reach their
        end with the steps in flight. How many they were."""
        items, planned = self._items, self._sequences
        num_before = len(items)
        for seq in sequences:
            start = seq.num_planned
            if start >= seq.capacity or start + 1 >= seq.end:
                continue
            if sitting_out and seq in sitting_out:
                continue
            num_blocks = len(seq.block_ids)
            if num_blocks == seq.num_sent_blocks:
                items.append(StepItem(seq.number, _DECODE, start, 1))
            else:
                fresh = tuple(seq.block_ids[seq.num_sent_blocks :])
                seq.num_sent_blocks = num_blocks
                items.append(StepItem(seq.number, _DECODE, start, 1, fresh))
            seq.num_planned = start + 1
            seq.num_in_flight += 1
            planned.append(seq)
        return len(items) - num_before

    def add_verified(self, seq: Sequence, drafts: tuple[int, ...]) -> None:
        """The last token of a sequence without a step in flight, and drafts behind it, for which it
        has blocks."""
        start = seq.num_planned
        ids = (*seq.tokens(start, start + 1), *drafts)
        fresh = tuple(seq.block_ids[seq.num_sent_blocks :])
        seq.num_sent_blocks = len(seq.block_ids)
        options = ItemOptions(token_ids=ids)
        item = StepItem(seq.number, _VERIFY, start, len(ids), fresh, options=options)
        self._items.append(item)
        seq.num_planned = start + len(ids)
        seq.num_drafts = len(drafts)
        seq.num_in_flight += 1
        self._sequences.append(seq)

    def add_prefill(self, seq: Sequence, share: int) -> None:
        """The next `share` tokens of a prompt."""
        start = seq.num_planned
        end = start + share
        scores = seq.scores_prompt and start + 1 < seq.num_prompt
        num_samples = seq.num_samples if end == seq.num_tokens else 0
        self._items.append(StepItem(seq.number, _PREFILL, start, share, (), num_samples, scores))
        seq.num_planned = end
        seq.num_in_flight += 1
        self._sequences.append(seq)

    def introduce(self, seq: Sequence) -> None:
        """A sequence that starts gets a number, and the worker learns it."""
        seq.number = self.new_number()
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
                slot=seq.slot,
                pooling=seq.pooling,
            )
        )

    def finish(self, num_decodes: int) -> StepPlan:
        """The plan, which is in flight from now on."""
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
            maps=state.tables.slots.drain(),
        )
        self._next_step += 1
        state.steps[plan.step] = StepInFlight(
            plan,
            self._sequences,
            [fork.child for fork in forks],
            [source for source, _ in copies],
            num_decodes,
        )
        self._clear()
        return plan

    def _clear(self) -> None:
        self._items: list[StepItem] = []
        self._sequences: list[Sequence] = []
        self._new: list[NewSequence] = []


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
        slot=child.slot,
    )
