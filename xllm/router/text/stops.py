"""Finds stop strings in a text that arrives in pieces, saying nothing that might begin one.

The match that ends first wins; of those that end together, the one that starts first. (Were it
the one that starts first, the answer would depend on how the text was cut into pieces.)
Invariant: text said so far is a prefix of the text, and no stop string starts within it unless it
ends in what `allow_from` excludes.
"""

from __future__ import annotations


class StopMatcher:
    """Stop strings of one choice."""

    __slots__ = ("_firsts", "_guard", "_held", "_longest", "_said", "_stops", "include")

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        self._stops = stops
        self.include = include
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops))
        self._held = ""
        self._said = 0
        """Characters given out; `_held` follows them."""
        self._guard = 0

    def allow_from(self, num_chars: int) -> None:
        """Matches count only if they end beyond the next `num_chars` characters (min_tokens)."""
        self._guard = self._said + len(self._held) + num_chars

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text to say, the stop string found or None). After one was found: feed no more."""
        buffer = self._held + text
        best: tuple[int, int, str] | None = None
        guard = self._guard - self._said
        for stop in self._stops:
            size = len(stop)
            at = buffer.find(stop, max(0, guard - size + 1))
            if at >= 0 and (best is None or (at + size, at) < best[:2]):
                best = (at + size, at, stop)
        if best is not None:
            end, start, stop = best
            self._held = ""
            return buffer[: end if self.include else start], stop
        keep = self._suffix(buffer)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        self._said += cut
        return buffer[:cut], None

    def finish(self) -> str:
        """The text held back: it began a stop string that never came."""
        text, self._held = self._held, ""
        return text

    def _suffix(self, buffer: str) -> int:
        """Length of the longest suffix that begins a stop string. Each size that does not fit
        lets one character go, so that a character is looked at about once however long the
        stops are; a table of their beginnings would cost a megabyte a choice."""
        firsts = self._firsts
        for size in range(min(self._longest - 1, len(buffer)), 0, -1):
            if buffer[-size] in firsts:
                tail = buffer[-size:]
                for stop in self._stops:
                    if len(stop) > size and stop.startswith(tail):
                        return size
        return 0
