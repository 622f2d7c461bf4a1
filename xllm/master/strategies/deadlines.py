"""Scheduling by urgency: deadlines of sequences, and the queue of those that wait.

The queue is kept by deadline, which never changes while a sequence waits; who of the WINDOW
earliest ones goes first is decided anew each time, so that a long queue costs no more.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from itertools import islice

from xllm.master.sequence import Sequence, SequencePhase
from xllm.master.strategies.keeping import NOMINAL_TOKEN_S
from xllm.master.strategies.step_model import StepTimeModel
from xllm.master.strategies.urgency import Rank, may_wait, rank, step_limit_s

WINDOW = 64
"""Waiting sequences that are compared by urgency; the others have later deadlines."""


class TokenDeadlines:
    """What each sequence should hold to, and how it stands. Seconds."""

    def __init__(self, ttft_s: float, tpot_s: float, model: StepTimeModel) -> None:
        """TokenDeadlines for requests without their own."""
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s
        self._model = model
        self.load_s = 0.0
        """Predicted time of all that is in sight, as of the last `look`."""

    def objective_s(self, seq: Sequence) -> float:
        """For its next token."""
        message = seq.request.message
        if seq.request.first_token_at:
            return message.tpot_ms / 1000 if message.tpot_ms else self._tpot_s
        return message.ttft_ms / 1000 if message.ttft_ms else self._ttft_s

    def deadline(self, seq: Sequence) -> float:
        """When its next token is due."""
        request = seq.request
        objective = self.objective_s(seq)
        if not request.first_token_at:
            return request.admitted_at + objective
        known = request.message.outputs
        num_known = len(known[seq.choice]) if seq.choice < len(known) else 0
        return request.first_token_at + (len(seq.output) - num_known) * objective

    def cost_s(self, seq: Sequence) -> float:
        """Predicted time of what it needs for its next token."""
        start = seq.num_computed
        num = max(1, seq.num_tokens - start)
        known = self._model.prefill_s(start, num)
        return num * NOMINAL_TOKEN_S if known is None else known

    def rank(self, seq: Sequence, now: float) -> Rank:
        """Where it stands."""
        deadline, objective = self.deadline(seq), self.objective_s(seq)
        return rank(seq.key, deadline, objective, self.cost_s(seq), now, self.load_s)

    def look(
        self, prefilling: Iterable[Sequence], waiting: Iterable[Sequence], num_decodes: int
    ) -> None:
        """A step begins: sum up what is in sight. `waiting`: by deadline."""
        total = sum(map(self.cost_s, prefilling))
        total += sum(map(self.cost_s, islice(waiting, WINDOW)))
        decode_s = self._model.decode_s(0)
        self.load_s = total + num_decodes * (decode_s or NOMINAL_TOKEN_S)

    def step_limit_s(self, decoding: list[Sequence], now: float) -> float | None:
        """What a step may take for the sake of its decodes; None without online ones."""
        online = [seq for seq in decoding if not seq.key[0]]
        if not online:
            return None
        slacks = [self.deadline(seq) - now for seq in online]
        return step_limit_s(slacks, min(map(self.objective_s, online)))

    def can_wait(self, seq: Sequence, step_s: float, now: float) -> bool:
        """Whether a decode may be left out of a step for something more urgent."""
        return bool(seq.key[0]) or may_wait(self.deadline(seq) - now, step_s)


class UrgencyQueue:
    """Waiting sequences by deadline; online before offline. The interface of WaitingQueue."""

    def __init__(self, objectives: TokenDeadlines) -> None:
        self._objectives = objectives
        # Ordered by (offline, deadline, key): keys are unique, hence no two entries are equal.
        self._entries: list[tuple[bool, float, tuple[bool, int, int, int], Sequence]] = []
        self._num_live = 0
        self._chosen = 0

    def __len__(self) -> int:
        return self._num_live

    def __iter__(self) -> Iterator[Sequence]:
        """The earliest deadlines first."""
        return (e[3] for e in self._entries if e[3].state is SequencePhase.WAITING)

    def push(self, seq: Sequence) -> None:
        """Add a sequence that waits. Its key must not be in the queue already."""
        entry = (seq.key[0], self._objectives.deadline(seq), seq.key, seq)
        bisect.insort(self._entries, entry)
        self._num_live += 1

    def peek(self, now: float) -> Sequence | None:
        """The most urgent sequence, which stays in the queue."""
        best: Rank | None = None
        found = None
        num_seen = 0
        for index, (_, _, _, seq) in enumerate(self._entries):
            if seq.state is not SequencePhase.WAITING:
                continue
            num_seen += 1
            if num_seen > WINDOW:
                break
            one = self._objectives.rank(seq, now)
            if best is None or one < best:
                best, found, self._chosen = one, seq, index
        return found

    def pop(self) -> Sequence:
        """Remove what `peek` just returned."""
        self._num_live -= 1
        return self._entries.pop(self._chosen)[3]

    def put_back(self, seq: Sequence) -> None:
        """What was popped for a look waits on, as if it had never left."""
        self.push(seq)

    def note_gone(self, seq: Sequence) -> None:
        """A queued sequence has left the state WAITING by another door."""
        self._num_live -= 1
        if len(self._entries) > 2 * self._num_live + WINDOW:
            self._entries = [e for e in self._entries if e[3].state is SequencePhase.WAITING]
