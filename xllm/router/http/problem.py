"""Errors in OpenAI's shape: status, type, code, param and a message that tells no internals.

Knows neither sockets nor requests. Invariant: what the service did wrong is described by a
fixed sentence; only what the client did wrong is explained in the error's own words.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import msgspec

from xllm.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    UnavailableError,
    XllmError,
    error_classes,
    error_from_code,
)
from xllm.protocol.generation import RequestFailed
from xllm.protocol.wrong_value import renamed

EXPLAINED = (RequestError, OverloadedError, UnavailableError, DeadlineError)
"""Errors whose own message is written for clients."""

TYPE_OF_STATUS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
MAX_MESSAGE_CHARS = 500
UNAVAILABLE_RETRY_S = 1.0


class Problem(Exception):
    """An error on its way to a client, with the status it is answered with."""

    def __init__(
        self,
        error: XllmError,
        status: int = 0,
        *,
        retry_after_s: float = 0.0,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(error.code)
        self.error = error
        self.status = status or status_of(error)
        self.retry_after_s = retry_after_s
        self.headers = headers


def status_of(error: XllmError) -> int:
    """The HTTP status of an error. A request that we aborted while its client still listens
    was drained: the client may try again."""
    return 503 if error.http_status == 499 else error.http_status


@contextlib.contextmanager
def field_named(inner: str | None, outer: str) -> Iterator[None]:
    """A refusal of the service's field `inner` (None: of no field that has a name) becomes one of
    the body's field `outer`."""
    try:
        yield
    except RequestError as error:
        if inner is not None:
            found = renamed(error.message, error.param, inner, outer)
        else:
            found = None if error.param else (f"{outer}: {error.message}", outer)
        if found is None:
            raise
        message, param = found
        raise type(error)(message, param=param) from error


def problem_of(error: Exception) -> Problem:
    """Any exception as a problem; one that is not ours is an internal error."""
    if isinstance(error, Problem):
        return error
    if not isinstance(error, XllmError):
        return Problem(XllmError("internal error"))
    retry = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
    return Problem(error, retry_after_s=retry)


def failure_named(failure: RequestFailed, outer: str) -> RequestFailed:
    """A failed request of which the body calls the prompt `outer`, in the body's words."""
    found = renamed(failure.message, failure.param, "prompt", outer)
    if found is None:
        return failure
    return msgspec.structs.replace(failure, message=found[0], param=found[1])


def problem_of_failure(failure: RequestFailed) -> Problem:
    """A failed request as the service reported it."""
    error = error_from_code(failure.code, failure.message, failure.param)
    headers = ((b"x-request-id", failure.request_id.encode()),) if failure.request_id else ()
    return Problem(error, retry_after_s=failure.retry_after_ms / 1000, headers=headers)


def problem_json(problem: Problem) -> bytes:
    """The body: `{"error": {message, type, param, code}}`."""
    error, status = problem.error, problem.status
    kind = TYPE_OF_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = error.message
    if not isinstance(error, EXPLAINED):
        message = EXPLANATION_OF_CODE.get(error.code, "The service failed this request.")
    return msgspec.json.encode(
        {
            "error": {
                "message": message[:MAX_MESSAGE_CHARS],
                "type": kind,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def problem_headers(problem: Problem) -> list[tuple[bytes, bytes]]:
    """The problem's own headers, and those that belong to the status."""
    headers = list(problem.headers)
    if problem.status in (429, 503):
        seconds = max(1, math.ceil(problem.retry_after_s or UNAVAILABLE_RETRY_S))
        headers.append((b"retry-after", str(seconds).encode()))
    elif problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


EXPLANATION_OF_CODE = {
    "aborted": "The request was stopped because this server is shutting down.",
    "engine_error": "The engine failed this request; others are unharmed.",
    "internal_error": "Internal error.",
}
assert EXPLANATION_OF_CODE.keys() <= error_classes().keys()
