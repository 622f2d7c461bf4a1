"""What an instance says of a request's prompt: the scores of its tokens, or its vector.

Invariant: a word that comes twice, after a move, changes nothing.
"""

from __future__ import annotations

import msgspec

from xllm.protocol.instance import PooledVector, PromptScores
from xllm.protocol.sampling import TokenLogprobs

PromptWord = PromptScores | PooledVector


class PromptWords(msgspec.Struct, eq=False, gc=False):
    """Collects them."""

    wants_vector: bool = False
    scores: list[TokenLogprobs | None] | None = None
    """One for each position, where they are asked for."""
    vector: bytes | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the vector is here, if one is wanted."""
        return not self.wants_vector or self.vector is not None

    def add(self, word: PromptWord) -> bool:
        """Take a word in; False where nobody asked for it."""
        if isinstance(word, PooledVector):
            if self.wants_vector:
                self.vector = word.vector
            return self.wants_vector
        known = self.scores
        if known is None:
            return False
        first, last = word.first_position, word.first_position + len(word.logprobs)
        if first >= 0 and last <= len(known):
            known[first:last] = word.logprobs
        return True
