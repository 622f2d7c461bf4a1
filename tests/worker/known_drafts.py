"""Drafts for tests: what an undisturbed run drew, with mistakes."""

from __future__ import annotations

import random
from collections.abc import Mapping

from xllm.master.sequence import Sequence


class KnownDrafts:
    """A DraftProposer that has seen the streams, by (request, choice). A guess is wrong with a
    probability of `wrong`, and as many as `most` with one of a half."""

    def __init__(
        self, streams: Mapping[tuple[str, int], list[int]], wrong: float = 0.2, seed: int = 1
    ) -> None:
        self._streams = streams
        self._wrong = wrong
        self._seed = seed

    def propose(self, seq: Sequence, most: int) -> tuple[int, ...]:
        # The same each time that it is asked: nothing has changed then.
        rng = random.Random(f"{self._seed} {seq.request_id} {seq.choice} {len(seq.output)}")
        stream = self._streams[seq.request_id, seq.choice]
        count = most if rng.random() < 0.5 else rng.randint(0, most)
        at = len(seq.output)
        known = stream[at : at + count]
        return tuple(rng.randrange(3, 500) if rng.random() < self._wrong else t for t in known)


class AllDrafts(KnownDrafts):
    """As much as may be, all of it right."""

    def propose(self, seq: Sequence, most: int) -> tuple[int, ...]:
        at = len(seq.output)
        return tuple(self._streams[seq.request_id, seq.choice][at : at + most])
