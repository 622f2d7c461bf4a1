"""One open request of a client: who waits for it, what came of it, and how to ask for the rest.

Pure. Invariant: `held` are the tokens that the listener has heard, by choice, from index 0 on
without holes; a message to another router carries exactly those.
"""

from __future__ import annotations

from array import array
from typing import Protocol

import msgspec

from xllm.errors import XllmError
from xllm.protocol.administration import ModelSleepSet, ObjectivesSet, RoleSet
from xllm.protocol.client import ClientMessage
from xllm.protocol.generation import (
    RequestFinished,
    ResumePoint,
    SubmitRequest,
    TokenDelta,
    next_life,
)
from xllm.protocol.questions import (
    DetokenizedText,
    HealthReport,
    ModelList,
    Pong,
    StatusReport,
    TokenizedText,
)

EndMessage = (
    RequestFinished
    | ModelList
    | HealthReport
    | StatusReport
    | TokenizedText
    | DetokenizedText
    | ModelSleepSet
    | Pong
    | RoleSet
    | ObjectivesSet
)
"""What ends a request or question well."""

MAX_CHOICES = 4096
"""A request for more was refused by its router, or will be: there is nothing to resume."""


class Listener(Protocol):
    """Who asked. Called on the client's loop; must not block and must not raise."""

    def on_delta(self, delta: TokenDelta) -> None:
        """New tokens of one choice, each token once and in order."""

    def on_end(self, message: EndMessage) -> None:
        """The answer is complete."""

    def on_error(self, error: XllmError) -> None:
        """There will be no (further) answer, and why."""


class OpenRequest:
    """One request or question that has not ended."""

    __slots__ = (
        "aborted",
        "attempt",
        "deadline",
        "finished",
        "heard",
        "held",
        "is_sent",
        "listener",
        "message",
        "num_losses",
        "num_refusals",
        "timeout_s",
    )

    def __init__(
        self, message: ClientMessage, listener: Listener, deadline: float, timeout_s: float
    ) -> None:
        self.message = message
        self.listener = listener
        self.deadline = deadline
        self.timeout_s = timeout_s
        self.attempt = 1
        """The highest attempt seen, or the first one of the present router."""
        self.held: dict[int, array[int]] = {}
        self.finished: set[int] = set()
        """Choices whose end was heard."""
        self.heard = False
        """Whether the present router said anything about it."""
        self.aborted = False
        """The asker wants it stopped: it is not worth another router."""
        self.is_sent = False
        """Whether the present router was asked."""
        self.num_losses = 0
        """Routers that were lost with it."""
        self.num_refusals = 0
        """Routers that had no instance for it."""

    @property
    def is_untouched(self) -> bool:
        """Whether no router was lost with it, none said anything of its answer, and it is still
        wanted: it may be asked for as if for the first time."""
        return not (self.num_losses or self.held or self.heard or self.aborted)

    def take(self, delta: TokenDelta) -> int:
        """Count a delta as heard. Returns 0 if it is new, -1 if it is late or double, and the
        number of tokens that never came where there is a hole before it."""
        if delta.attempt < self.attempt or delta.choice in self.finished:
            return -1
        self.heard = True
        self.attempt = delta.attempt
        held = self.held.get(delta.choice)
        if held is None:
            held = self.held[delta.choice] = array("q")
        if delta.token_ids:
            hole = delta.first_index - len(held)
            if hole:
                return max(hole, -1)
            held.extend(delta.token_ids)
        if delta.finish_reason:
            self.finished.add(delta.choice)
        return 0

    def lost(self) -> None:
        """The router that was asked is gone: the next one begins a life of its own."""
        if self.is_sent:
            self.is_sent = False
            self.heard = False
            self.num_losses += 1

    def refused(self) -> None:
        """The router that was asked has no instance for it, and did nothing."""
        self.is_sent = False
        self.num_refusals += 1

    def words(self, now: float) -> ClientMessage:
        """What to say to the present router: the request, with what the last ones gave of it."""
        message = self.message
        if not self.num_losses + self.num_refusals or not isinstance(message, SubmitRequest):
            return message
        left_ms = max(1, int((self.deadline - now) * 1000))
        sampling = message.sampling
        if not self.num_losses:
            return msgspec.structs.replace(message, timeout_ms=left_ms)
        if message.embed or sampling.seed is None or not 1 <= sampling.n <= MAX_CHOICES:
            return msgspec.structs.replace(message, timeout_ms=left_ms)
        held = self.held
        outputs = tuple(tuple(held.get(choice, ())) for choice in range(sampling.n))
        point = ResumePoint(attempt=self.attempt, outputs=outputs, seed=sampling.seed)
        self.attempt = next_life(self.attempt)
        return msgspec.structs.replace(message, timeout_ms=left_ms, resume=point)
