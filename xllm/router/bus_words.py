"""Whose words a bus carries: its owner's, a successor's at its address, or forged ones. Pure.

Where a process restarts on a fixed port under another name, who was subscribed to the old one hears
the new one before the registry tells of it: a word that is nobody's there yet may be a
successor's, and is withheld, which is no alarm. It was forged once

- somebody whom the registry has at that address speaks under one incarnation before and after it
  (one process has an address at a time, so who speaks in between is the same), or
- such words have come, and no others, for longer than the record of a process that ended can stand.
"""

from __future__ import annotations

from xllm.protocol.bus import BusMessage

Verdict = tuple[BusMessage | None, int]
"""How many words are forged, as is seen now; and the first of them, the first time."""


class BusWords:
    """What was heard on one bus. `handover_s`: how long the record of who left may stand."""

    __slots__ = ("_first", "_handover_s", "_heard", "_num_withheld", "_since", "is_forged")

    def __init__(self, handover_s: float) -> None:
        self.is_forged = False
        """Something was said there that is nobody's."""
        self._handover_s = handover_s
        self._heard: set[tuple[type[BusMessage], str, str]] = set()
        """Who was heard under a registered name and incarnation."""
        self._first: BusMessage | None = None
        self._num_withheld = 0
        self._since = 0.0
        """First of the words that may be a successor's, how many they are, and since when."""

    def known(self, word: BusMessage) -> Verdict:
        """A word of who is registered there, under that incarnation."""
        speaker = (type(word), word.publisher, word.incarnation)
        has_spoken = speaker in self._heard
        self._heard.add(speaker)
        if self._first is None:
            return None, 0
        if has_spoken:
            return self._judge()
        self._first, self._num_withheld = None, 0
        return None, 0

    def foreign(self, word: BusMessage, now: float, *, may_be_heard: bool) -> Verdict:
        """A word of nobody who is registered there. `may_be_heard`: somebody may say such a word
        on a bus of its own."""
        if self._first is None:
            self._first, self._since = word, now
        self._num_withheld += 1
        if not self.is_forged and may_be_heard and now - self._since <= self._handover_s:
            return None, 0
        return self._judge()

    def wait(self, now: float) -> None:
        """The registry tells nothing at present: no time passes for a successor."""
        self._since = now

    def _judge(self) -> Verdict:
        first, count = None if self.is_forged else self._first, self._num_withheld
        self._first, self._num_withheld = None, 0
        self.is_forged = True
        return first, count
