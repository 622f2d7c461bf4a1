"""Which tokens a sequence has, and how often each is in its output: what penalties ask for.

Kept as flat arrays beside the history, so that a step reads them without walking the history.
Invariant: equal to counts made anew from prompt and output.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class TokenCounts:
    """The tokens of one sequence. `seen_ids`: distinct ids of prompt and output; `output_ids`:
    distinct ids of the output, `output_counts` how often each is there."""

    __slots__ = ("_places", "_seen", "output_counts", "output_ids", "seen_ids")

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int]) -> None:
        self._seen = set(prompt_ids)
        self._places: dict[int, int] = {}
        self.seen_ids = array("q", self._seen)
        self.output_ids = array("q")
        self.output_counts = array("d")
        for token in output_ids:
            self.add(token)

    def behind(self, tokens: Iterable[int]) -> TokenCounts:
        """The counts as they would be with more tokens out; these stay."""
        found = TokenCounts((), ())
        found._seen, found._places = set(self._seen), dict(self._places)
        found.seen_ids, found.output_ids = self.seen_ids[:], self.output_ids[:]
        found.output_counts = self.output_counts[:]
        for token in tokens:
            found.add(token)
        return found

    def add(self, token: int) -> None:
        """One more token of the output."""
        place = self._places.setdefault(token, len(self._places))
        if place < len(self.output_ids):
            self.output_counts[place] += 1
            return
        self.output_ids.append(token)
        self.output_counts.append(1)
        if token not in self._seen:
            self._seen.add(token)
            self.seen_ids.append(token)
