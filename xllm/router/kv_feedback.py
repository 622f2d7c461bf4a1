"""What the index promised against what engines found. Pure.

A request that is placed is promised so many cached tokens; its instance says in the end how many
there were. Promises that are broken again and again mean that the index is wrong about that
instance. And an instance that computes prompts while the index has nothing of it does not tell what
it caches: it is *silent*, which no gap and no digest shows.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque

MAX_PROMISES = 16384
"""Open promises that are kept; requests that were aborted leave theirs behind."""
JUDGED = 16
BROKEN = 8
"""So many broken promises of the last JUDGED ones make an instance doubtful."""
SLACK_BLOCKS = 4
SILENT_REQUESTS = 3
SILENT_BLOCKS = 16
SILENT_WORDS = 10
"""An instance is silent when it computed so many requests and blocks and sent so many heartbeats
since, and the index still has nothing of it."""


@dataclasses.dataclass(slots=True)
class FeedbackFigures:
    """Counts over all requests that were promised something, or nothing, by the index."""

    num_promises: int = 0
    promised_tokens: int = 0
    found_tokens: int = 0
    over_tokens: int = 0
    """Promised and not found."""
    under_tokens: int = 0
    """Found and not promised."""
    num_broken: int = 0
    """Promises of which at least half, and four blocks, were not there."""


class Promises:
    """Of the requests that are open."""

    def __init__(self) -> None:
        self.figures = FeedbackFigures()
        self._open: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._judged: dict[str, deque[bool]] = {}

    def promise(self, request_id: str, instance: str, num_tokens: int) -> None:
        """The request goes to that instance, which should have so many of its tokens cached. A
        later promise of the same request replaces it."""
        self._open.pop(request_id, None)
        self._open[request_id] = (instance, num_tokens)
        if len(self._open) > MAX_PROMISES:
            self._open.popitem(last=False)

    def found(self, request_id: str, instance: str, num_tokens: int, block_size: int) -> bool:
        """The request ended well there, with so many cached tokens: whether that instance is
        doubtful now."""
        kept = self._open.pop(request_id, None)
        if kept is None or kept[0] != instance:
            return False
        promised = kept[1]
        counts = self.figures
        counts.num_promises += 1
        counts.promised_tokens += promised
        counts.found_tokens += num_tokens
        counts.over_tokens += max(0, promised - num_tokens)
        counts.under_tokens += max(0, num_tokens - promised)
        is_broken = promised - num_tokens >= max(promised / 2, SLACK_BLOCKS * block_size)
        counts.num_broken += is_broken
        judged = self._judged.setdefault(instance, deque(maxlen=JUDGED))
        judged.append(is_broken)
        if sum(judged) < BROKEN:
            return False
        judged.clear()
        return True

    def forget(self, instance: str) -> None:
        """The instance is gone."""
        self._judged.pop(instance, None)


@dataclasses.dataclass(slots=True)
class _Work:
    num_requests: int = 0
    num_blocks: int = 0
    since_seq: int = 0


class SilenceWatch:
    """Which instances compute and do not tell."""

    def __init__(self) -> None:
        self._work: dict[str, _Work] = {}
        self.silent: set[str] = set()

    def computed(self, instance: str, num_blocks: int, seq: int) -> None:
        """It computed so many whole blocks of a prompt while the index had nothing of it; `seq`: of
        its last heartbeat."""
        if num_blocks:
            work = self._work.setdefault(instance, _Work(since_seq=seq))
            work.num_requests += 1
            work.num_blocks += num_blocks

    def look(self, instance: str, is_empty: bool, seq: int) -> bool:
        """At a heartbeat; `is_empty`: the index has nothing of it. True where it has just become
        silent."""
        if not is_empty:
            self.forget(instance)
            return False
        work = self._work.get(instance)
        if work is None or instance in self.silent:
            return False
        is_silent = (
            work.num_requests >= SILENT_REQUESTS
            and work.num_blocks >= SILENT_BLOCKS
            and seq >= work.since_seq + SILENT_WORDS
        )
        if is_silent:
            self.silent.add(instance)
        return is_silent

    def forget(self, instance: str) -> None:
        """It told something, or is gone."""
        self._work.pop(instance, None)
        self.silent.discard(instance)
