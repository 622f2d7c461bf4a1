"""The ZeroMQ front end: clients' messages to the service, and its answers back.

Knows connections by identity and each client's own request numbers; decides nothing about
requests. A connection that goes away aborts its requests. Invariant: an open number of a
connection stands for exactly one open request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import structlog

from xllm.errors import (
    BackpressureError,
    ConflictError,
    OverloadedError,
    TransportError,
    XllmError,
)
from xllm.protocol.client import (
    AbortRequest,
    BadMessage,
    ClientMessage,
    DetokenizeIds,
    ListModels,
    ModelList,
    QueryHealth,
    QueryStatus,
    RequestFailed,
    RouterMessage,
    SubmitRequest,
    TokenDelta,
    TokenizeText,
)
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import Transport, describe_error
from xllm.protocol.transport.limits import CLIENT_LIMITS
from xllm.protocol.transport.router import RouterSocket
from xllm.router.front import Tenant
from xllm.router.service import RouterService

_log = structlog.get_logger("zmq_front")
MAX_QUESTIONS = 64
"""Unanswered questions (health, tokenize) of one connection at most."""
SLOW_QUEUE = 1000
"""A connection for which more messages wait gets fewer, larger ones until none waits."""
SLOW_HOLD_S = 0.2
RETRY_S = 0.2
"""Between attempts to tell the ends of requests to a connection whose queue is full."""


class ZmqConnection:
    """One client's connection: its open requests by its own numbers."""

    __slots__ = ("identity", "is_slow", "num_questions", "open", "owed", "tenant")

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.open: dict[int, str] = {}
        self.num_questions = 0
        self.is_slow = False
        self.owed: list[RouterMessage] = []
        """Messages other than deltas that found the queue full."""
        # Each connection is its own tenant to the text pool; prefixes are shared by all.
        self.tenant = Tenant(f"zmq-{identity.hex()[:32]}")


class ZmqSink:
    """Sends one request's messages to its connection."""

    __slots__ = ("_connection", "_front")

    def __init__(self, front: ZmqFront, connection: ZmqConnection) -> None:
        self._front = front
        self._connection = connection

    def send(self, message: RouterMessage) -> None:
        """Send; a terminal message frees its number."""
        connection = self._connection
        if type(message) is not TokenDelta:
            connection.open.pop(message.id, None)  # type: ignore[union-attr]  # all have ids
        self._front.reply(connection, message)


class ZmqFront:
    """Listens on `endpoint` for clients. `spawn` runs a coroutine as a task of the actor."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        service: RouterService,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[Any]],
    ) -> None:
        self._service = service
        self._spawn = spawn
        self._connections: dict[bytes, ZmqConnection] = {}
        self._cut: set[bytes] = set()
        self._socket: RouterSocket[ClientMessage] = RouterSocket(
            transport,
            endpoint,
            Decoder(ClientMessage),
            self._on_message,
            on_gone=self._gone,
            bad_reply=lambda text: BadMessage(message=text),
            limits=CLIENT_LIMITS,
            name="clients",
        )
        self.endpoint = self._socket.endpoint

    @property
    def num_connections(self) -> int:
        """Connections that have spoken."""
        return len(self._connections)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def reply(self, connection: ZmqConnection, message: RouterMessage) -> None:
        """Send to a connection. One that reads slowly gets larger messages; one that does not
        read at all loses its requests, and is told so if it reads again."""
        identity = connection.identity
        try:
            self._socket.send(identity, message)
            if connection.is_slow or self._socket.num_queued(identity) > SLOW_QUEUE:
                self._pace(connection)
        except BackpressureError:
            if not isinstance(message, TokenDelta):
                connection.owed.append(message)
            if identity not in self._cut:
                self._cut.add(identity)
                _log.warning("client_does_not_read", num_open=len(connection.open))
                loop = asyncio.get_running_loop()
                # Later: the service is in the middle of this request.
                loop.call_soon(self._abort_all, connection)
                loop.call_later(RETRY_S, self._pay, connection)
        except TransportError:
            pass  # it left; `_gone` follows

    def _pace(self, connection: ZmqConnection) -> None:
        num_queued = self._socket.num_queued(connection.identity)
        if connection.is_slow and num_queued:
            return
        connection.is_slow = num_queued > SLOW_QUEUE
        hold_s = SLOW_HOLD_S if connection.is_slow else 0.0
        for request_id in connection.open.values():
            self._service.dispatcher.slow_down(request_id, hold_s)

    def _pay(self, connection: ZmqConnection) -> None:
        """Say what is owed, as far as there is room."""
        identity = connection.identity
        if self._connections.get(identity) is not connection:
            return
        self._cut.discard(identity)
        owed, connection.owed = connection.owed, []
        for message in owed:
            self.reply(connection, message)

    def _abort_all(self, connection: ZmqConnection) -> None:
        for request_id in list(connection.open.values()):
            self._service.abort(request_id)

    def _gone(self, identity: bytes) -> None:
        self._cut.discard(identity)
        connection = self._connections.pop(identity, None)
        if connection is not None:
            self._abort_all(connection)

    def _on_message(self, identity: bytes, message: ClientMessage, frames: list[bytes]) -> None:
        connection = self._connections.get(identity)
        if connection is None:
            connection = self._connections[identity] = ZmqConnection(identity)
        if isinstance(message, SubmitRequest):
            self._submit(connection, message)
        elif isinstance(message, AbortRequest):
            request_id = connection.open.get(message.id)
            if request_id:
                self._service.abort(request_id)
        elif isinstance(message, ListModels):
            self.reply(connection, ModelList(id=message.id, models=self._service.models()))
        elif isinstance(message, QueryStatus):
            report = self._service.status()
            self.reply(connection, msgspec.structs.replace(report, id=message.id))
        else:
            self._ask(connection, message)

    def _submit(self, connection: ZmqConnection, request: SubmitRequest) -> None:
        number = request.id
        if number in connection.open:
            error = ConflictError(f"request {number} of this connection is open", param="id")
            self.reply(connection, _failed(number, error))
            return
        connection.open[number] = ""
        request_id = self._service.submit(request, connection.tenant, ZmqSink(self, connection))
        if number in connection.open:
            connection.open[number] = request_id
            if connection.is_slow:
                self._service.dispatcher.slow_down(request_id, SLOW_HOLD_S)

    # -- questions ---------------------------------------------------------------------------

    def _ask(
        self, connection: ZmqConnection, message: QueryHealth | TokenizeText | DetokenizeIds
    ) -> None:
        if connection.num_questions >= MAX_QUESTIONS:
            error = OverloadedError(f"{MAX_QUESTIONS} questions of this connection are open")
            self.reply(connection, _failed(message.id, error))
            return
        connection.num_questions += 1
        service = self._service
        answer: Awaitable[RouterMessage]
        if isinstance(message, QueryHealth):
            answer = service.health(message.probe)
        elif isinstance(message, TokenizeText):
            answer = service.tokenize(message, connection.tenant)
        else:
            answer = service.detokenize(message, connection.tenant)
        self._spawn(self._answer(connection, message.id, answer))

    async def _answer(
        self, connection: ZmqConnection, number: int, answer: Awaitable[RouterMessage]
    ) -> None:
        try:
            reply = msgspec.structs.replace(await answer, id=number)
        except XllmError as error:
            reply = _failed(number, error)
        except Exception as error:
            _log.error("question_failed", error=describe_error(error))
            reply = _failed(number, XllmError("an internal error"))
        finally:
            connection.num_questions -= 1
        self.reply(connection, reply)


def _failed(number: int, error: XllmError) -> RequestFailed:
    retry_ms = int(error.retry_after_s * 1000) if isinstance(error, OverloadedError) else 0
    return RequestFailed(
        id=number,
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_ms=retry_ms,
    )
