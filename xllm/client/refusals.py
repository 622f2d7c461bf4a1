"""Requests that a router refused for want of an instance: another router may have one.

Pure. They wait for a moment, until it is known whether the router refuses all that this client has
there: only then is it worth leaving, for what runs there would be drawn again elsewhere. Meanwhile
nothing new of their models is asked of it; what is for other models does not wait.
"""

from __future__ import annotations

from xllm.client.retries import MAX_LOSSES
from xllm.errors import UnavailableError, XllmError
from xllm.protocol.client import ClientMessage
from xllm.protocol.generation import RequestFailed, SubmitRequest

JUDGED_IN_S = 0.05
"""So long a router may have other requests of this client before it is kept for their sake."""


class Refusals:
    """Those of the present router, by model and request."""

    def __init__(self) -> None:
        self._errors: dict[str, dict[int, XllmError]] = {}
        self._since: dict[str, float] = {}
        """By model: when they were first looked at."""
        self._models: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._models

    def holds(self, message: ClientMessage) -> bool:
        """Whether nothing of its model is to be asked of the router now."""
        return isinstance(message, SubmitRequest) and message.model in self._errors

    def add(self, request_id: int, model: str, error: XllmError) -> None:
        """The router refused it."""
        self._models[request_id] = model
        self._errors.setdefault(model, {})[request_id] = error

    def drop(self, request_id: int) -> bool:
        """It ended otherwise. Whether requests of its model waited for that."""
        model = self._models.pop(request_id, None)
        if model is None:
            return False
        del self._errors[model][request_id]
        if self._errors[model]:
            return False
        self._forget(model)
        return True

    def judged(self, now: float) -> dict[int, XllmError]:
        """Call often while the router has other requests of this client. What it refused long
        enough ago, and is told now: it is none of these any more."""
        told: dict[int, XllmError] = {}
        for model in tuple(self._errors):
            if now - self._since.setdefault(model, now) >= JUDGED_IN_S:
                told |= self._errors[model]
                self._forget(model)
        for request_id in told:
            del self._models[request_id]
        return told

    def clear(self) -> None:
        """The router is left."""
        self._errors.clear()
        self._since.clear()
        self._models.clear()

    def _forget(self, model: str) -> None:
        del self._errors[model]
        self._since.pop(model, None)


def is_worth_another(
    asked: object, answer: RequestFailed, num_refusals: int, num_routers: int
) -> bool:
    """Whether a refused request, of which nothing was heard, is asked for again at the next router:
    no more often than there are routers. What is wrong with a request is so everywhere, a limit or
    a full line is the cluster's, and of other refusals their router says so."""
    others = min(num_routers - 1, MAX_LOSSES)
    return (
        answer.code == UnavailableError.code
        and not answer.everywhere
        and isinstance(asked, SubmitRequest)
        and num_refusals < others
    )
