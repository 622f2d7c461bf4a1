"""A whole answer without a task: the terminal message of its request writes the response.

Knows messages, shapes and the connection, no ASGI. Invariant: the connection gets exactly one
response, whatever the request came to; `fail` makes one of an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from xllm.protocol.client import RouterMessage
from xllm.protocol.generation import RequestFailed, RequestFinished
from xllm.router.http.context import Connection
from xllm.router.http.problem import Problem, problem_headers, problem_json, problem_of_failure
from xllm.router.http.shape import AnswerShape

Fail = Callable[[Exception], None]
CLOSE = (b"connection", b"close")


class DirectAnswer:
    """The sink of the one request behind an HTTP request. `make_shape(request_id, created)`."""

    __slots__ = ("_connection", "_fail", "_make_shape", "done")

    def __init__(
        self, connection: Connection, make_shape: Callable[[str, int], AnswerShape], fail: Fail
    ) -> None:
        self._connection = connection
        self._make_shape = make_shape
        self._fail = fail
        self.done = False

    def send(self, message: RouterMessage) -> None:
        """Take a message; deltas have nothing that the terminal message lacks."""
        if type(message) is RequestFinished:
            self._end()
            try:
                self._write(message)
            except Exception as error:  # whoever sends has nobody to tell
                self._fail(error)
        elif type(message) is RequestFailed:
            self._end()
            self._fail(problem_of_failure(message))

    def _end(self) -> None:
        self.done = True
        self._connection.unwatch()

    def _write(self, result: RequestFinished) -> None:
        request_id = result.request_id
        body = self._make_shape(request_id, int(time.time())).whole((result,), result.usage)
        lines = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
        self._connection.respond(200, lines % (len(body), request_id.encode()), body)


def respond_problem(connection: Connection, problem: Problem) -> None:
    """An error as a whole response."""
    body = problem_json(problem)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += problem_headers(problem)
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers if pair != CLOSE])
    connection.respond(problem.status, lines, body, close=CLOSE in headers)
