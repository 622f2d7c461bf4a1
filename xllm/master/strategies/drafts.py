"""Who guesses tokens that a step then verifies.

A wrong guess costs the rows that it took and nothing else: what is drawn never depends on it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence as AbstractSequence
from typing import Protocol

from xllm.master.sequence import Sequence

_TOKEN = struct.Struct("<i")
_LONGEST, _SHORTEST = 4, 2
"""Last tokens that are looked for, the longest first: one alone says too little."""
_WINDOW = 8192
"""Tokens back to which they are looked for: what a look costs is bounded."""


class DraftProposer(Protocol):
    """Guesses what follows a sequence's tokens."""

    def propose(self, seq: Sequence, most: int) -> tuple[int, ...]:
        """At most `most` tokens that may follow those that the sequence has now; none where
        nothing is known. Changes nothing of the sequence but its `history`."""
        ...


class History:
    """A sequence's tokens as bytes, in which others are found quickly. Tokens only join."""

    __slots__ = ("_data", "num_tokens")

    def __init__(self) -> None:
        self._data = bytearray()
        self.num_tokens = 0

    def extend(self, tokens: AbstractSequence[int]) -> None:
        """More tokens."""
        self._data += struct.pack(f"<{len(tokens)}i", *tokens)
        self.num_tokens += len(tokens)

    def find_last(self, count: int, window: int) -> int:
        """Where the last `count` tokens stood before, the last time within the last `window`
        tokens; -1: nowhere."""
        width, data = _TOKEN.size, self._data
        wanted = data[-count * width :]
        first = max(0, len(data) - window * width)
        end = len(data) - width  # it may lie over the last ones, but is not them
        while (at := data.rfind(wanted, first, end)) >= 0:
            if at % width == 0:
                return at // width
            end = at + len(wanted) - 1
        return -1

    def tokens(self, start: int, stop: int) -> list[int]:
        """Those at [start, stop)."""
        width = _TOKEN.size
        found = struct.iter_unpack("<i", self._data[start * width : stop * width])
        return [token for (token,) in found]


class PromptLookup:
    """What followed the last tokens where they stood before, in the prompt or in the output
    (prompt lookup decoding: Saxena, 2023). Where that place is close it is taken to repeat."""

    def propose(self, seq: Sequence, most: int) -> tuple[int, ...]:
        """See DraftProposer."""
        if most <= 0:
            return ()
        history = seq.history
        if history is None:
            history = seq.history = History()
        history.extend(seq.tokens(history.num_tokens, seq.num_tokens))
        for count in range(min(_LONGEST, seq.num_tokens - 1), _SHORTEST - 1, -1):
            at = history.find_last(count, _WINDOW)
            if at >= 0:
                follow = at + count
                found = history.tokens(follow, min(follow + most, seq.num_tokens))
                return tuple(found[k % len(found)] for k in range(most))
        return ()
