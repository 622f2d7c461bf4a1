"""Requests that a router refused for want of an instance: another router may have one.

Pure. They wait for a moment, until it is known whether the router refuses all that this client has
there: only then is it worth leaving, for what runs there would be drawn again elsewhere. Meanwhile
nothing new is asked of it.
"""

from __future__ import annotations

from enum import Enum

from xllm.client.retries import MAX_LOSSES
from xllm.errors import UnavailableError, XllmError
from xllm.protocol.client import RequestFailed, SubmitRequest

JUDGED_IN_S = 0.05
"""So long a router may have other requests of this client before it is kept for their sake."""


class Worth(Enum):
    """What refusals say of the present router."""

    OPEN = "open"
    """Nothing yet."""
    KEEP = "keep"
    """It serves others: who was refused is told."""
    LEAVE = "leave"
    """It serves nobody of this client: the next one is asked."""


class Refusals:
    """Those of the present router, by request."""

    def __init__(self) -> None:
        self._errors: dict[int, XllmError] = {}
        self._since: float | None = None

    def __len__(self) -> int:
        return len(self._errors)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._errors

    def add(self, request_id: int, error: XllmError) -> None:
        """The router refused it."""
        self._errors[request_id] = error

    def drop(self, request_id: int) -> None:
        """It ended otherwise."""
        self._errors.pop(request_id, None)

    def judge(self, now: float, *, serves_others: bool) -> Worth:
        """Call often. `serves_others`: whether the router has further requests of this client."""
        if not self._errors:
            self._since = None
            return Worth.OPEN
        if not serves_others:
            return Worth.LEAVE
        if self._since is None:
            self._since = now
        return Worth.KEEP if now - self._since >= JUDGED_IN_S else Worth.OPEN

    def take(self) -> dict[int, XllmError]:
        """All of them, which are none any more."""
        errors, self._errors = self._errors, {}
        self._since = None
        return errors


def is_worth_another(
    asked: object, answer: RequestFailed, num_refusals: int, num_routers: int
) -> bool:
    """Whether a refused request, of which nothing was heard, is asked for again at the next router:
    no more often than there are routers. What is wrong with a request is so everywhere, and a
    limit or a full line is the cluster's."""
    others = min(num_routers - 1, MAX_LOSSES)
    return (
        answer.code == UnavailableError.code
        and isinstance(asked, SubmitRequest)
        and num_refusals < others
    )
