"""uvicorn's httptools protocol for requests that are answered without a task of their own.

Knows cycles and bytes, no endpoints. uvicorn makes a task for each request; one that comes as a
whole, alone on its connection, is given to `begin` instead, which mostly answers it by `respond`.
Invariant: a request gets either, and bytes leave in the order of the requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from xllm.router.http.joining import JoiningTransport
from xllm.router.http.respond import Application, Scope

Begin = Callable[[Scope, bytes], Application | None]
"""Answers a request with this body by `respond`, now or later, or returns what answers it as a
task."""


class TasklessProtocol(HttpToolsProtocol):
    """Who feeds the parser sets `_is_feeding` meanwhile, then calls `_answer_fresh`; `_say_idle`
    hears that nothing is left to answer. The transport is a JoiningTransport."""

    def __init__(self, *, begin: Begin, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._begin = begin
        self._is_feeding = False
        self._fresh: RequestResponseCycle | None = None
        """A request that the bytes being read began, and that nobody answers yet."""
        self._begun: RequestResponseCycle | None = None
        """The request that `respond` answers."""

    def respond(self, status: int, lines: bytes, body: bytes, *, close: bool = False) -> None:
        """Write the whole answer of the request that was begun without a task: a status, header
        lines and a body. `close`: the connection ends with it."""
        cycle, self._begun = self._begun, None
        assert cycle is not None
        if cycle.disconnected:
            return
        cycle.response_started = cycle.response_complete = True
        cycle.keep_alive = cycle.keep_alive and not close
        parts = [STATUS_LINE[status], lines]
        parts += [b"%b: %b\r\n" % pair for pair in self.server_state.default_headers]
        parts += (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)
        cast("JoiningTransport", self.transport).write_whole(b"".join(parts))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """Go on with what came meanwhile."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._say_idle()

    def _answer_fresh(self) -> None:
        cycle, self._fresh = self._fresh, None
        if cycle is None:
            return
        app: Application | None = cast("Application", self.app)
        is_whole = not (cycle.more_body or cycle.disconnected)
        # What waits for a client that does not read is not added to.
        if is_whole and not (self.flow.write_paused or self.transport.is_closing()):
            self._begun = cycle
            app = self._begin(cast("Scope", cycle.scope), bytes(cycle.body))
        if app is not None:
            self._begun = None
            self._start_asgi_task(cycle, app)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Answer a request in a task; or, as long as more of it may be read, later."""
        if self._is_feeding and not cycle.waiting_for_100_continue:
            self._fresh = cycle
            return
        task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _say_idle(self) -> None:
        raise AssertionError("subclasses hear this")
