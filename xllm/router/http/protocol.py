"""One HTTP connection: uvicorn's httptools protocol with bounds on size and time.

Knows bytes and deadlines, no endpoints. Invariant: a request's head and body are bounded before
they are kept, a connection that makes no progress is closed, and whoever answers a request
learns at once when its client goes away.
"""

from __future__ import annotations

import asyncio
import http
import math
import socket
from collections.abc import Callable
from typing import Any, cast

import httptools

from xllm.errors import InvalidRequestError, PayloadTooLargeError, UnavailableError, XllmError
from xllm.router.http.joining import JoiningTransport
from xllm.router.http.limits import BODY_BYTES_PER_S, HttpLimits
from xllm.router.http.problem import Problem, problem_headers, problem_json
from xllm.router.http.taskless import TasklessProtocol

CLOSE_AFTER_REFUSAL_S = 0.5
"""A refused client gets this long to read why; nothing more is read from it."""


class GuardedProtocol(TasklessProtocol):
    """Refuses what is too large, too slow or ambiguous, with a JSON error."""

    def __init__(
        self, *, limits: HttpLimits, on_refused: Callable[[int], None], **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.limits = limits
        self.on_refused = on_refused
        self.on_lost: Callable[[], None] | None = None
        self._refused = False
        self._problem: Problem | None = None
        self._in_head = True
        self._raw_head_bytes = 0
        self._head_bytes = 0
        self._body_bytes = 0
        self._deadline = math.inf
        self._blocked_since = math.inf

    # what the application sees

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call `on_lost` once when the client goes away, until `unwatch`."""
        if self.transport.is_closing() or self.parser is None:
            on_lost()
            return
        self.on_lost = on_lost
        if not self.pipeline:
            self.flow.resume_reading()  # a paused socket does not tell that its peer left

    def unwatch(self) -> None:
        """The request is answered."""
        self.on_lost = None

    def abort(self) -> None:
        """Drop the connection with whatever is still unsent."""
        self.transport.abort()

    def check_time(self, now: float) -> None:
        """Close the connection if it stood still for too long. Seconds of the loop's clock."""
        if now - self._blocked_since > self.limits.blocked_s:
            self.transport.abort()
        elif now > self._deadline and not self.flow.read_paused and not self._refused:
            if self._in_head and not self._raw_head_bytes:
                self.transport.close()
            else:
                self._refuse(Problem(InvalidRequestError("the request came too slowly"), 408))

    # the transport's side

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Take the connection, unless there are too many."""
        super().connection_made(JoiningTransport(transport, self.loop))
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._deadline = self.loop.time() + self.limits.head_s
        if len(self.connections) > self.limits.max_connections:
            self._refuse(Problem(UnavailableError("too many connections")))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever is answering."""
        super().connection_lost(exc)
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._blocked_since = self.loop.time()

    def resume_writing(self) -> None:
        """The client caught up."""
        super().resume_writing()
        self._blocked_since = math.inf

    def data_received(self, data: bytes) -> None:
        """Feed the parser; anything that it or a bound refuses ends the connection."""
        if self._refused:
            return
        if self._in_head:
            if not self._raw_head_bytes:  # what is set is for a connection that says nothing
                self._deadline = self.loop.time() + self.limits.head_s
            self._raw_head_bytes += len(data)
        self._is_feeding = True
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            problem = self._problem or Problem(InvalidRequestError("this is no HTTP request"))
            self._refuse(problem)
        else:
            most = self.limits.max_head_bytes
            if self._in_head and self._raw_head_bytes > most + self.limits.max_url_bytes:
                self._refuse(too_large("the header", most, 431))
        self._is_feeding = False
        self._answer_fresh()

    # the parser's side; an exception here ends feed_data

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        cast("dict[str, Any]", self.scope)["connection"] = self
        self._head_bytes = 0
        self._body_bytes = 0
        self._arm_head()

    def on_url(self, url: bytes) -> None:
        """A piece of the address."""
        super().on_url(url)
        if len(self.url) > self.limits.max_url_bytes:
            self._stop(too_large("the address", self.limits.max_url_bytes, 414))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self.limits.max_head_bytes:
            self._stop(too_large("the header", self.limits.max_head_bytes, 431))
        if len(self.headers) > self.limits.max_headers:
            self._stop(too_large("the header", self.limits.max_headers, 431, "lines"))

    def on_headers_complete(self) -> None:
        """Refuse what is ambiguous or will be too large, before anything answers."""
        if not self.url.startswith(b"/"):
            self._stop(bad("the address must be a path"))
        if self.parser.should_upgrade():
            self._stop(bad("upgrades are not supported"))
        num_hosts = length = 0
        for name, value in self.headers:
            if name == b"host":
                num_hosts += 1
            elif name == b"content-length":
                length = int(value)
        if num_hosts > 1 or (not num_hosts and self.parser.get_http_version() != "1.0"):
            self._stop(bad("exactly one Host header is needed"))
        if length > self.limits.max_body_bytes:
            self._stop(too_large("the body", self.limits.max_body_bytes, 413))
        self._in_head = False
        self._deadline = self.loop.time() + self.limits.body_s
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count what arrives, whoever reads it."""
        self._body_bytes += len(body)
        self._deadline += len(body) / BODY_BYTES_PER_S
        if self._body_bytes > self.limits.max_body_bytes:
            self._stop(too_large("the body", self.limits.max_body_bytes, 413))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here as a whole."""
        self._in_head = True
        self._raw_head_bytes = 0
        self._deadline = math.inf
        super().on_message_complete()
        if self.cycle.response_complete:  # refused before its body was here
            self._say_idle()

    def _say_idle(self) -> None:
        # By the sweep: a timer for each request would cost as much as the rest of it here.
        if self._deadline == math.inf:
            self._deadline = self.loop.time() + self.limits.keep_alive_s

    def _arm_head(self) -> None:
        if self._deadline == math.inf:
            self._deadline = self.loop.time() + self.limits.head_s

    def _stop(self, problem: Problem) -> None:
        self._problem = problem
        raise problem

    def _refuse(self, problem: Problem) -> None:
        """Answer with an error and close. Where an earlier request of the connection is still
        being answered, or this one's answer has begun, nothing may be written between."""
        self._refused = True
        self.on_refused(problem.status)
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or not cycle.more_body:
                self.transport.close()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        self.flow.pause_reading()
        self.transport.write(refusal(problem))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(CLOSE_AFTER_REFUSAL_S, self.transport.close)


def drain(connection: GuardedProtocol) -> None:
    """End it with its present answer; at once where there is none, unless a request comes, or the
    first one still has to: its client would take that for a failure."""
    cycle = connection.cycle
    if cycle is not None and not (cycle.response_complete and connection._raw_head_bytes):
        connection.shutdown()


def bad(message: str) -> Problem:
    """A request that is no proper HTTP."""
    return Problem(InvalidRequestError(message))


def too_large(what: str, limit: int, status: int, unit: str = "bytes") -> Problem:
    """A head, address or body beyond its bound."""
    error: XllmError = PayloadTooLargeError(f"{what} is larger than {limit} {unit}")
    return Problem(error, status)


def refusal(problem: Problem) -> bytes:
    """A whole response, as bytes, that closes the connection."""
    body = problem_json(problem)
    phrase = http.HTTPStatus(problem.status).phrase.encode()
    lines = [
        b"HTTP/1.1 %d %b" % (problem.status, phrase),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
        *(b"%b: %b" % pair for pair in problem_headers(problem)),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
