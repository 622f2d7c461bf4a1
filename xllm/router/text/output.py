"""The output object: what one choice says, from the tokens it drew.

Detokenizes, matches stop strings against output text only, and counts. Knows nothing of requests,
messages or time; `xllm run` uses the same. Invariant: said text and stop point depend on the
tokens alone, not on how they were cut into calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.errors import InvariantError
from xllm.router.text.detokenizer import Detokenizer
from xllm.router.text.stops import StopMatcher


class TextOutput:
    """Text of one choice. Once `stop` is set or `finish` was called it takes nothing more."""

    __slots__ = ("_detokenizer", "_matcher", "_min_tokens", "num_tokens", "stop")

    def __init__(
        self, detokenizer: Detokenizer, matcher: StopMatcher | None = None, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._min_tokens = min_tokens
        self.num_tokens = 0
        """Tokens that count: all fed, up to the one that completed a stop string."""
        self.stop: str | None = None
        """The stop string that ended the text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that may be said now. Tokens after a stop string are neither said nor
        counted."""
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.feed(token_ids)
        if self.stop is not None:
            return ""
        return self._feed_matching(token_ids, self._matcher)

    def _feed_matching(self, token_ids: Sequence[int], matcher: StopMatcher) -> str:
        said = []
        for token_id in token_ids:
            self.num_tokens += 1
            if self.num_tokens < self._min_tokens:
                said.append(self._feed_guarded(token_id, matcher))
                continue
            piece = self._detokenizer.feed((token_id,))
            text, self.stop = matcher.feed(piece)
            said.append(text)
            if self.stop is not None:
                break
        return "".join(said)

    def _feed_guarded(self, token_id: int, matcher: StopMatcher) -> str:
        """A token before min_tokens: its text may begin a stop string but not complete one."""
        matcher.allow_from(len(piece := self._detokenizer.feed((token_id,))))
        return matcher.feed(piece)[0]

    def count_hidden(self, num_tokens: int) -> None:
        """Count tokens that have no text: the stop id that ended the choice."""
        self.num_tokens += num_tokens

    def finish(self) -> str:
        """The text that was held back, now that nothing follows."""
        if self.stop is not None:
            return ""
        rest = self._detokenizer.finish()
        if self._matcher is None:
            return rest
        return self._matcher.finish() + rest

    def check(self) -> None:
        """InvariantError if the state cannot be."""
        if self.stop is not None and self._matcher is None:
            raise InvariantError(f"stopped at {self.stop!r} without stop strings")
        if self.num_tokens < 0:
            raise InvariantError(f"{self.num_tokens} tokens")
