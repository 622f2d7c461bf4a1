"""What an instance says of a request's prompt: the scores of its tokens, or its vector.

Invariant: a word that comes twice, after a move, changes nothing.
"""

from __future__ import annotations

from xllm.protocol.instance import PooledVector, PromptScores
from xllm.protocol.sampling import TokenLogprobs

PromptWord = PromptScores | PooledVector


class PromptWords:
    """Collects them. `num_scored`: positions of the prompt that get scores; 0: none."""

    __slots__ = ("scores", "vector", "wants_vector")

    def __init__(self, num_scored: int, wants_vector: bool) -> None:
        self.scores: list[TokenLogprobs | None] | None = [None] * num_scored or None
        self.wants_vector = wants_vector
        self.vector: bytes | None = None

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
