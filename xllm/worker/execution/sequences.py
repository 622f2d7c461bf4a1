"""The sequences that this worker knows: their tokens, sampling settings and block tables.

The token history lives here, so that penalties and the next step's input never wait for the
master. It learns from plans and from the tokens that were drawn; it knows no tensors.
Invariant: every block id in a table is in the pool; a history only grows.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence

from xllm.errors import EngineError, InvariantError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import NewSequence, StepItem, StepPlan
from xllm.worker.execution.pending_tokens import PENDING, PendingTokens
from xllm.worker.sampling.counts import TokenCounts


class SequenceState:
    """One sequence: prompt, output so far, and where its KV lies."""

    __slots__ = (
        "block_ids",
        "choice",
        "counts",
        "is_open",
        "output_ids",
        "pending",
        "prompt_ids",
        "sampling",
        "seq",
        "slot",
        "stop_ids",
    )

    def __init__(self, new: NewSequence, prompt_ids: tuple[int, ...]) -> None:
        self.seq = new.seq
        self.prompt_ids = prompt_ids
        self.output_ids = list(new.output_ids)
        self.sampling: SamplingParams = new.sampling
        self.choice = new.choice
        self.stop_ids = new.stop_ids
        self.slot = new.slot
        self.block_ids = array("q")
        self.counts: TokenCounts | None = None
        self.pending = PendingTokens()
        self.is_open = False
        """A step that verifies drafts of it is under way: nobody knows its length."""

    @property
    def length(self) -> int:
        """Tokens of prompt and output, those that are pending too."""
        return len(self.prompt_ids) + len(self.output_ids)

    def append(self, token: int) -> None:
        """One more token is out."""
        self.output_ids.append(token)
        if self.counts is not None:
            self.counts.add(token)

    def expect(self, source: int) -> None:
        """One more token is drawn, to a place of the device; see PendingTokens."""
        self.pending.add(self.length, source)
        self.output_ids.append(PENDING)

    def settle(self, token: int) -> None:
        """The first of the pending tokens is known."""
        self.output_ids[self.pending.settle() - len(self.prompt_ids)] = token
        if self.counts is not None:
            self.counts.add(token)

    def counted(self) -> TokenCounts:
        """The counts of its tokens, of which none is pending; kept from the first call on."""
        if self.counts is None:
            self.counts = TokenCounts(self.prompt_ids, self.output_ids)
        return self.counts

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """The tokens at positions [start, end), all of them known."""
        border = len(self.prompt_ids)
        if end <= border:
            return self.prompt_ids[start:end]
        if start >= border:
            return self.output_ids[start - border : end - border]
        return [*self.prompt_ids[start:], *self.output_ids[: end - border]]


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceTableStatistics:
    """How much the table holds."""

    num_sequences: int
    num_tokens: int
    num_refused: int


class SequenceTable:
    """The sequences by number. `begin` takes a plan's news; what of them makes no sense is
    remembered as refused, as is what failed, so that only that sequence's items fail."""

    def __init__(self, num_blocks: int, vocab_size: int) -> None:
        self._num_blocks = num_blocks
        self.vocab_size = vocab_size
        self._states: dict[int, SequenceState] = {}
        self._refused: dict[int, str] = {}

    def begin(self, plan: StepPlan) -> None:
        """Learn the plan's new sequences, then forget its ended ones: a fork finds a parent that
        ends in the same plan."""
        for new in plan.new:
            try:
                self._learn(new)
            except EngineError as error:
                self._refused[new.seq] = error.message
        for seq in plan.ended:
            self._refused.pop(seq, None)
            self._states.pop(seq, None)

    def find(self, seq: int) -> SequenceState:
        """A known sequence; raises EngineError with the reason where it is not."""
        state = self._states.get(seq)
        if state is None:
            raise EngineError(self._refused.get(seq, f"sequence {seq} is not known here"))
        return state

    def knows(self, seq: int) -> bool:
        """Whether a sequence is here, and has not failed."""
        return seq in self._states

    def refuse(self, seq: int, reason: str) -> None:
        """A sequence failed: its KV and its history have a gap, so that every later item of it
        fails with this reason, until it is ended."""
        self._states.pop(seq, None)
        self._refused.setdefault(seq, reason)

    def join_blocks(self, state: SequenceState, block_ids: Sequence[int]) -> None:
        """Append to a block table; raises EngineError for a block that is not in the pool."""
        for block in block_ids:
            if not 0 <= block < self._num_blocks:
                raise EngineError(f"sequence {state.seq}: block {block} of {self._num_blocks}")
        state.block_ids.extend(block_ids)

    def slot_needs(self, items: Sequence[StepItem], block_size: int) -> dict[int, int]:
        """How many leading blocks of which slots the items touch."""
        needs: dict[int, int] = {}
        for item in items:
            state = self._states.get(item.seq)
            if state is not None and state.slot >= 0:
                num_blocks = -(-(item.start + item.num_tokens) // block_size)
                needs[state.slot] = max(num_blocks, needs.get(state.slot, 0))
        return needs

    def statistics(self) -> SequenceTableStatistics:
        """How many sequences and tokens are held."""
        tokens = sum(state.length for state in self._states.values())
        return SequenceTableStatistics(len(self._states), tokens, len(self._refused))

    def check(self) -> None:
        """Raise InvariantError where a table or a history cannot be."""
        for seq, state in self._states.items():
            if seq != state.seq or seq in self._refused:
                raise InvariantError(f"sequence {seq} is filed wrongly")
            if any(not 0 <= block < self._num_blocks for block in state.block_ids):
                raise InvariantError(f"sequence {seq} has a block outside the pool")

    def _learn(self, new: NewSequence) -> None:
        if new.seq in self._states:
            raise EngineError(f"sequence {new.seq} is already known")
        if new.adapter:
            raise EngineError(f"sequence {new.seq}: adapters are not supported")
        prompt_ids = new.prompt_ids
        if new.parent >= 0:
            parent = self._states.get(new.parent)
            if parent is None:
                raise EngineError(f"sequence {new.seq}: its parent {new.parent} is not known")
            prompt_ids = parent.prompt_ids
        elif not prompt_ids:
            raise EngineError(f"sequence {new.seq} has no prompt")
        for ids in (new.prompt_ids, new.output_ids):
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise EngineError(
                    f"sequence {new.seq}: token {max(ids)} or {min(ids)} of {self.vocab_size}"
                )
        state = SequenceState(new, prompt_ids)
        self.join_blocks(state, new.block_ids)
        self._states[new.seq] = state
