"""One token stream in the engine: its tokens, how far they are computed, and its blocks.

A record without decisions: `state` (a SequencePhase) and the counters are changed by the
scheduler's parts only.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm.master.request import RequestState
    from xllm.master.strategies.drafts import History

NO_SLOT = -1
NEVER = 1 << 62
"""A token count that no sequence reaches."""


class SequencePhase(IntEnum):
    """Where a sequence stands. HELD: prefilled, its blocks kept for a hand-off. PAUSED:
    off the steps, its KV kept."""

    WAITING = 0
    RUNNING = 1
    PAUSED = 2
    HELD = 3
    FINISHED = 4


class Sequence:
    """Tokens are prompt_ids + output; KV is computed for the first `num_computed` of them.

    `number`: its name at the worker, -1 while the worker does not know it. `end`: num_tokens at
    which it ends by length. `num_samples`: what its prefill draws: 1, n before the fork of a
    leader, 0 if only the prompt's scores or its vector are wanted. `hashes`: content hashes of
    its first blocks, as far as they were needed. `num_sealed`: leading blocks cached as its own;
    `is_private`: the next one could not be, so that none is until it is released. `seal_at`:
    num_computed at which the next block is complete. `num_in_flight`: steps under way.
    `num_planned`: positions that are computed or in a step under way; of a decode it may be past
    the tokens that are known here. `num_drafts`: those of them that are guesses, verified by the
    step under way; then there is no other. `num_passed`: others that started before it while it
    waited for a prefix. `pooling`: how its rows become a vector; empty: they do not. `history`:
    what a strategy that guesses tokens keeps of it; `may_draft`: whether it is asked."""

    __slots__ = (
        "attempt", "block_ids", "capacity", "choice", "end", "hashes", "history", "is_prefilling",
        "is_private", "key", "may_draft", "min_tokens", "num_computed", "num_drafts",
        "num_in_flight", "num_passed", "num_planned", "num_prompt", "num_samples", "num_sealed",
        "num_sent_blocks", "num_tokens", "number", "output", "pooling", "prompt_ids", "request",
        "request_id", "scores_prompt", "seal_at", "slot", "state", "stop_ids",
    )  # fmt: skip

    def __init__(
        self, request: RequestState, choice: int, output: list[int], hashes: list[bytes]
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.attempt = request.attempt
        self.choice = choice
        self.key = (*request.key, choice)
        self.state = SequencePhase.WAITING
        self.number = -1
        self.prompt_ids = request.prompt_ids
        self.num_prompt = len(self.prompt_ids)
        self.output = output
        self.num_tokens = self.num_prompt + len(output)
        self.end = request.end
        self.stop_ids = request.stop_ids
        self.min_tokens = request.sampling.min_tokens
        self.num_samples = 1
        self.scores_prompt = False
        self.pooling = ""
        self.hashes = hashes
        self.is_prefilling = True
        self.num_in_flight = 0
        self.num_drafts = 0
        self.num_passed = 0
        self.may_draft = True
        self.history: History | None = None
        self.block_ids: list[int] = []
        self.slot = NO_SLOT
        self.clear_kv()

    def clear_kv(self) -> None:
        """Forget blocks that were released: nothing is computed any more."""
        self.block_ids = []
        self.capacity = 0
        self.num_computed = 0
        self.num_planned = 0
        self.num_sealed = 0
        self.num_sent_blocks = 0
        self.is_private = False
        self.seal_at = NEVER

    @property
    def needs_all_rows(self) -> bool:
        """Whether every position must be computed here, and none may be taken from the cache."""
        return self.scores_prompt or self.pooling == "mean"

    def tokens(self, start: int, stop: int) -> tuple[int, ...] | list[int]:
        """Token ids of positions [start, stop)."""
        num_prompt = self.num_prompt
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        if start >= num_prompt:
            return self.output[start - num_prompt : stop - num_prompt]
        return [*self.prompt_ids[start:], *self.output[: stop - num_prompt]]

    def finish_reason(self) -> str:
        """stop, length or "", judged by the tokens it has now."""
        num_output = len(self.output)
        if num_output > self.min_tokens and num_output and self.output[-1] in self.stop_ids:
            return "stop"
        return "length" if self.num_tokens >= self.end else ""

    def story(self) -> str:
        """One line for errors."""
        return (
            f"request {self.request_id} attempt {self.attempt} choice {self.choice} "
            f"{self.state.name} number {self.number}: {self.num_computed} of {self.num_tokens} "
            f"tokens computed, end {self.end}, blocks {self.block_ids}, sealed {self.num_sealed}"
        )
