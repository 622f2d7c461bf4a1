"""Writing whole ASGI responses and reading bodies, without response objects.

Knows ASGI's messages only. Invariant: a response is one start and one body message.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from xllm.router.http.problem import Problem, problem_headers, problem_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON_TYPE = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client closed its connection before we had its whole request."""


async def send_body(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    content_type: tuple[bytes, bytes] = JSON_TYPE,
    headers: Headers | None = None,
) -> None:
    """One whole response."""
    lines = [content_type, (b"content-length", b"%d" % len(body))]
    if headers:
        lines += headers
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


async def send_problem(send: Send, problem: Problem) -> None:
    """An error as a whole response."""
    headers = problem_headers(problem)
    await send_body(send, problem_json(problem), status=problem.status, headers=headers)


async def read_body(receive: Receive) -> bytes:
    """The whole body; its size is bounded by the protocol that feeds it."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        return body
    pieces = [body]
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)
