"""One publisher's part of an index, kept true by its numbered words. Pure: it is told the time.

A publisher (one incarnation of it) starts with nothing at number 0, and each of its words says what
changed since the one before, how many blocks it has and their digest. A word that is missing, or a
digest that differs, makes the part *unknown*: the index does not speak of it until a snapshot
came. Words that arrive meanwhile are kept, and applied to the snapshot where they are younger.
At most one question is open at a time, each is asked after a random while, so that a crowd of
routers does not ask at once, and asked again when no answer came. Words in a wrong order heal
without a snapshot. Invariant: a known part is what the publisher had at number `seq`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from xllm.errors import InvalidRequestError
from xllm.kvcache.index import KvIndex
from xllm.protocol.bus import DaemonHeartbeat, InstanceHeartbeat, SnapshotOfBlocks

ANSWER_S = 2.0
"""How long a snapshot may take before it is asked for again."""
RETRY_S = 0.2
"""After this a question is tried again that could not be sent."""
MAX_KEPT_BYTES = 16 << 20
"""Words that are kept while a snapshot is under way; above that they are given up, and the words
after them show the gap. One that cannot be asked, but is heard, talks for hours."""
_WORD_BYTES = 2048
"""Of a word without its bytes."""
QUIET_S = 60.0
"""After so long without a doubt the next one is acted on at once."""
MAX_DELAY_S = 30.0


@dataclasses.dataclass(slots=True)
class FeedFigures:
    """Counts over all publishers of a router."""

    num_words: int = 0
    num_gaps: int = 0
    """Words that were missed: once each time."""
    num_repeated: int = 0
    """Words that were heard before."""
    num_healed: int = 0
    """Gaps that late words closed."""
    num_asked: int = 0
    num_resyncs: int = 0
    """Snapshots that were taken over."""
    num_ignored: int = 0
    """Snapshots that came too late, or from another incarnation."""
    num_mismatches: int = 0
    """Digests that were not the index's."""
    num_distrusted: int = 0
    """Publishers whose promises were wrong too often."""
    num_bad: int = 0
    """Events of a form that cannot be."""
    num_given_up: int = 0
    """Times that the kept words were too many."""


class PublisherFollower:
    """`jitter` gives the seconds to wait before a question. `tier`: the one that it speaks of."""

    def __init__(
        self,
        index: KvIndex,
        publisher: str,
        incarnation: str,
        tier: str,
        figures: FeedFigures,
        jitter: Callable[[], float],
    ) -> None:
        self.publisher = publisher
        self.incarnation = incarnation
        self.tier = tier
        self.seq = 0
        """Of the last word that is in the index."""
        self.is_known = False
        self.num_resyncs = 0
        self.unknown_since: float | None = None
        """None: known, or not heard yet."""
        self._index = index
        self._figures = figures
        self._jitter = jitter
        self._has_base = True
        self._highest = 0
        self._kept: dict[int, InstanceHeartbeat | DaemonHeartbeat] = {}
        self._kept_bytes = 0
        self._ask_at: float | None = None
        self._answer_by = float("-inf")
        self._num_doubts = 0
        self._doubted_at = float("-inf")
        index.replace(publisher, tier, b"")
        index.hide(publisher)

    # -- what the publisher says -------------------------------------------------------------

    def word(self, word: InstanceHeartbeat | DaemonHeartbeat, now: float) -> None:
        """A heartbeat. Those of other incarnations are ignored."""
        if word.incarnation != self.incarnation:
            return
        self._figures.num_words += 1
        if word.seq <= self.seq or word.seq in self._kept:
            self._figures.num_repeated += 1
            return
        is_first = not self._highest and not self.seq
        self._highest = max(self._highest, word.seq)
        if self.is_known and word.seq == self.seq + 1:
            self._apply(word, now)
            self._verify(word, now)
            return
        if self.is_known:
            self._figures.num_gaps += 1
            self._become_unknown(now, 0.0)
        self._keep(word)
        self._catch_up(now)
        if is_first and not self.is_known:
            self._become_unknown(now, 0.0)
        elif self.is_known and not is_first:
            self._figures.num_healed += 1

    def snapshot(self, answer: SnapshotOfBlocks, now: float) -> None:
        """The answer to a question. One that is not needed any more is ignored."""
        self._answer_by = now
        if self.is_known or answer.incarnation != self.incarnation or answer.seq < self.seq:
            self._figures.num_ignored += 1
            if not self.is_known:
                self._ask_at = now + self._jitter()
            return
        try:
            self._index.replace(self.publisher, answer.tier, answer.hashes)
        except InvalidRequestError:
            self._figures.num_bad += 1
            self._ask_at = now + MAX_DELAY_S
            return
        self._figures.num_resyncs += 1
        self.num_resyncs += 1
        self.seq = answer.seq
        self._has_base = True
        for seq in [seq for seq in self._kept if seq <= answer.seq]:
            self._take(seq)
        self._ask_at = now + self._jitter()
        self._catch_up(now)

    def doubt(self, now: float) -> None:
        """What is known may be wrong: unknown until a snapshot came. Doubts that follow each other
        are acted on ever later."""
        self._num_doubts = 0 if now - self._doubted_at > QUIET_S else self._num_doubts + 1
        self._doubted_at = now
        self._has_base = False
        delay_s = min(MAX_DELAY_S, 0.5 * (2.0 ** min(self._num_doubts, 10) - 1.0))
        self._become_unknown(now, delay_s)

    # -- questions ---------------------------------------------------------------------------

    def wants_snapshot(self, now: float) -> bool:
        """Whether to ask now; `asked` follows."""
        return not self.is_known and self._ask_at is not None and now >= self._ask_at

    def asked(self, now: float, reached: bool) -> None:
        """A question was sent, or could not be."""
        if reached:
            self._figures.num_asked += 1
            self._answer_by = now + ANSWER_S
        self._ask_at = now + (ANSWER_S + self._jitter() if reached else RETRY_S)

    def is_asked(self, now: float) -> bool:
        """Whether an answer may still come."""
        return now < self._answer_by

    def end(self) -> None:
        """The publisher is gone."""
        self._index.forget(self.publisher)

    # -- inside ------------------------------------------------------------------------------

    def _become_unknown(self, now: float, delay_s: float) -> None:
        self._index.hide(self.publisher)
        self.is_known = False
        self.unknown_since = now
        self._ask_at = now + delay_s + self._jitter()

    def _keep(self, word: InstanceHeartbeat | DaemonHeartbeat) -> None:
        self._kept[word.seq] = word
        self._kept_bytes += _num_bytes(word)
        if self._kept_bytes > MAX_KEPT_BYTES:
            self._kept.clear()
            self._kept_bytes = 0
            self._figures.num_given_up += 1

    def _take(self, seq: int) -> InstanceHeartbeat | DaemonHeartbeat:
        word = self._kept.pop(seq)
        self._kept_bytes -= _num_bytes(word)
        return word

    def _catch_up(self, now: float) -> None:
        """Apply the kept words that follow, and be known where none is missing."""
        last = None
        while self._has_base and self.seq + 1 in self._kept:
            last = self._take(self.seq + 1)
            self._apply(last, now)
        if not self._has_base or self.seq < self._highest:
            return
        self.is_known = True
        self.unknown_since = None
        self._ask_at = None
        self._index.hide(self.publisher, False)
        if last is not None:
            self._verify(last, now)

    def _apply(self, word: InstanceHeartbeat | DaemonHeartbeat, now: float) -> None:
        self.seq = word.seq
        try:
            for events in word.events:
                self._index.apply(self.publisher, events.stored, events.removed, events.tier)
        except InvalidRequestError:
            self._figures.num_bad += 1
            self.doubt(now)

    def _verify(self, word: InstanceHeartbeat | DaemonHeartbeat, now: float) -> None:
        """Compare with what the publisher says that it has now, if it says so."""
        if word.num_cached < 0 or not self.is_known:
            return
        part = self._index.part(self.publisher, self.tier)
        assert part is not None
        if part.is_whole and (part.num_blocks, part.digest) != (word.num_cached, word.digest):
            self._figures.num_mismatches += 1
            self.doubt(now)


def _num_bytes(word: InstanceHeartbeat | DaemonHeartbeat) -> int:
    events = sum(len(one.stored) + len(one.removed) for one in word.events)
    return _WORD_BYTES + len(word.metrics) + events
