"""In-batch sharing of a prefix that is still being computed: who waits for whom.

A waiting sequence whose next block that is not cached is just being computed by a running prefill
(its leader) is held back until that block is sealed, and then finds it cached. The leader need
not know: where it is preempted, cancelled or fails, it is among the running prefills no more, and
who waited for it is free. Others may pass a follower, up to a bound; past it the queue stops at
the follower, as at any sequence that cannot start. An online sequence waits for online leaders
only: an offline one may be left aside for long.

Invariants: nobody is held who would not save at least one block; a leader runs, so a hold ends;
of any two sequences that hold each other back one runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.kvcache.prefix import MatchResult
from xllm.master.sequence import Sequence

MAX_PASSED = 64
"""Sequences that may start before one that is held back and stands before them in the queue."""
MAX_HELD = 32
"""Sequences held back that are looked past in one plan."""


class PrefixSharing:
    """The blocks that running prefills are about to seal, for one plan at a time. `begin`, then
    `add_leader` for each prefill that starts in the plan, and `is_held` for who waits."""

    def __init__(self, block_size: int, enabled: bool) -> None:
        self._block_size = block_size
        self._enabled = enabled
        # By the hash of a block: whether only offline prefills are about to seal it.
        self._pending: dict[bytes, bool] = {}

    def begin(self, prefilling: Iterable[Sequence]) -> None:
        """A new plan; these prefills run."""
        self._pending.clear()
        if self._enabled:
            for seq in prefilling:
                self.add_leader(seq)

    def add_leader(self, seq: Sequence) -> None:
        """This prefill runs. Its first block that is not sealed stands for all that follow: who
        shares a later one shares this one, and a sealed one is cached."""
        index = seq.num_sealed
        is_whole = (index + 1) * self._block_size <= seq.num_tokens
        if self._enabled and is_whole and index < len(seq.hashes) and not seq.is_private:
            content = seq.hashes[index]
            self._pending[content] = self._pending.get(content, True) and seq.key[0]

    def is_held(self, seq: Sequence, match: MatchResult) -> bool:
        """Whether a waiting sequence, whose cached prefix is `match`, is to wait for a leader."""
        if not self._pending or seq.needs_all_rows:
            return False
        index = len(match.block_ids)
        # The last position is computed in any case: a match never covers it.
        if index >= (seq.num_tokens - 1) // self._block_size:
            return False
        is_offline = self._pending.get(seq.hashes[index])
        return is_offline is not None and (seq.key[0] or not is_offline)
