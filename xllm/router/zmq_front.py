"""The ZeroMQ front end: clients' messages to the service, and its answers back.

Knows connections by identity and each client's own request numbers; decides nothing about
requests. A connection that goes away aborts its requests, and so does one that does not read: it
is cut, which means that nothing is begun for it until it reads again. Invariants: an open number
of a connection stands for exactly one open request; a request of which a delta was dropped ends
as a failure; what waits for a connection is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import structlog

from xllm.errors import (
    BackpressureError,
    OverloadedError,
    PermissionDeniedError,
    TransportError,
    XllmError,
)
from xllm.protocol.administration import SetModelSleep, SetObjectives, SetRole
from xllm.protocol.client import BadMessage, ClientMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import (
    AbortRequest,
    RequestFailed,
    RequestFinished,
    SubmitRequest,
    TokenDelta,
)
from xllm.protocol.questions import (
    DetokenizeIds,
    ListModels,
    ModelList,
    Ping,
    Pong,
    QueryHealth,
    QueryStatus,
    RouterAddress,
    TokenizeText,
)
from xllm.protocol.transport.allow_list import CLIENT_DOMAIN
from xllm.protocol.transport.context import Transport, describe_error
from xllm.protocol.transport.limits import client_limits
from xllm.protocol.transport.router import RouterSocket
from xllm.router.front import Tenant, tenant_of
from xllm.router.service import RouterService

_log = structlog.get_logger("zmq_front")
MAX_QUESTIONS = 64
"""Unanswered questions (health, tokenize) of one connection at most."""
SLOW_QUEUE = 1000
"""A connection for which more messages wait gets fewer, larger ones until none waits."""
SLOW_HOLD_S = 0.2
RETRY_S = 0.2
"""Between attempts to tell the ends of requests to a connection that was cut."""
MAX_REFUSALS = 4096
"""Refused submits that a cut connection will be told of; further ones are dropped."""

"""Whose limits hold for a client that no key names, over HTTP or here."""
NOT_READ = "this connection does not read its answers"


class ZmqConnection:
    """One client's connection: its open requests by its own numbers."""

    __slots__ = (
        "has_pinged",
        "identity",
        "is_cut",
        "is_slow",
        "num_questions",
        "open",
        "owed",
        "tenant",
        "torn",
    )

    def __init__(self, identity: bytes, tenant: Tenant) -> None:
        self.identity = identity
        self.open: dict[int, str] = {}
        self.num_questions = 0
        self.has_pinged = False
        """It knows what a `pong` is, and is told when this router stops."""
        self.is_slow = False
        self.is_cut = False
        """Its queue was full: it is told the ends of its requests once it reads again."""
        self.owed: deque[RequestFinished | RequestFailed] = deque()
        self.torn: set[int] = set()
        """Open requests of which a delta was dropped: they cannot end well any more."""
        self.tenant = tenant


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
    """Listens on `endpoint` for clients. `spawn` runs a coroutine as a task of the actor;
    `max_bytes`: of a client's message; `peers`: the other routers, for clients to know."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        service: RouterService,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[Any]],
        *,
        max_bytes: int = 4 << 20,
        peers: Callable[[], tuple[RouterAddress, ...]] = tuple,
    ) -> None:
        self._service = service
        self._peers = peers
        self._spawn = spawn
        self._connections: dict[bytes, ZmqConnection] = {}
        self._socket: RouterSocket[ClientMessage] = RouterSocket(
            transport,
            endpoint,
            Decoder(ClientMessage),
            self._on_message,
            on_gone=self._gone,
            bad_reply=lambda text: BadMessage(message=text),
            denied_reply=lambda message, text: _failed(message.id, PermissionDeniedError(text)),
            limits=client_limits(max_bytes),
            domain=CLIENT_DOMAIN,
            name="clients",
        )
        self.endpoint = self._socket.endpoint

    @property
    def num_connections(self) -> int:
        """Connections that have spoken."""
        return len(self._connections)

    def say_stopping(self) -> None:
        """Tell clients that this router takes nothing new: they may go on at another."""
        for connection in list(self._connections.values()):
            if connection.has_pinged and not connection.is_cut:
                self.reply(connection, self._pong(0))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def reply(self, connection: ZmqConnection, message: RouterMessage) -> None:
        """Send to a connection. One that reads slowly gets larger messages; one that does not
        read at all loses its requests, and is told so if it reads again."""
        if connection.is_cut:
            self._owe(connection, message)
            return
        identity = connection.identity
        try:
            self._socket.send(identity, message)
            if connection.is_slow or self._socket.num_queued(identity) > SLOW_QUEUE:
                self._pace(connection)
        except BackpressureError:
            connection.is_cut = True
            _log.warning("client_does_not_read", num_open=len(connection.open))
            loop = asyncio.get_running_loop()
            # Later: the service is in the middle of this request.
            loop.call_soon(self._abort_all, connection)
            loop.call_later(RETRY_S, self._pay, connection)
            self._owe(connection, message)
        except TransportError:
            pass  # it left; `_gone` follows

    def _owe(self, connection: ZmqConnection, message: RouterMessage) -> None:
        """The connection is cut: keep the ends of its requests, drop the rest. (Its requests
        are aborted when it is cut, and it gets no new ones.)"""
        if type(message) is TokenDelta:
            connection.torn.add(message.id)
        elif isinstance(message, RequestFinished | RequestFailed):
            if isinstance(message, RequestFinished) and message.id in connection.torn:
                message = _failed(message.id, OverloadedError(NOT_READ), message.request_id)
            connection.torn.discard(message.id)
            connection.owed.append(message)

    def _pace(self, connection: ZmqConnection) -> None:
        num_queued = self._socket.num_queued(connection.identity)
        if connection.is_slow and num_queued:
            return
        connection.is_slow = num_queued > SLOW_QUEUE
        hold_s = SLOW_HOLD_S if connection.is_slow else 0.0
        for request_id in connection.open.values():
            self._service.dispatcher.slow_down(request_id, hold_s)

    def _pay(self, connection: ZmqConnection) -> None:
        """Say what is owed, as far as there is room; then the connection is as good as new."""
        identity = connection.identity
        if self._connections.get(identity) is not connection:
            return
        owed = connection.owed
        try:
            while owed:
                self._socket.send(identity, owed[0])
                owed.popleft()
        except BackpressureError:
            pass  # it still does not read
        except TransportError:
            return  # it left; `_gone` follows
        if owed or self._socket.num_queued(identity) > SLOW_QUEUE:
            asyncio.get_running_loop().call_later(RETRY_S, self._pay, connection)
        else:
            connection.is_cut = False

    def _abort_all(self, connection: ZmqConnection) -> None:
        for request_id in list(connection.open.values()):
            self._service.abort(request_id)

    def _gone(self, identity: bytes) -> None:
        connection = self._connections.pop(identity, None)
        if connection is not None:
            self._abort_all(connection)

    def _on_message(self, identity: bytes, message: ClientMessage, frames: list[bytes]) -> None:
        connection = self._connections.get(identity)
        if connection is None:
            tenant = tenant_of(identity, self._socket.peer(identity))
            connection = self._connections[identity] = ZmqConnection(identity, tenant)
        if isinstance(message, SubmitRequest):
            self._submit(connection, message)
        elif isinstance(message, AbortRequest):
            request_id = connection.open.get(message.id)
            if request_id:
                self._service.abort(request_id)
        elif isinstance(message, Ping):
            connection.has_pinged = True
            if not connection.is_cut:
                self.reply(connection, self._pong(message.id))
        elif connection.is_cut:
            return  # nobody would read the answer
        elif isinstance(message, ListModels):
            self.reply(connection, ModelList(id=message.id, models=self._service.models()))
        elif isinstance(message, QueryStatus):
            report = self._service.status()
            self.reply(connection, msgspec.structs.replace(report, id=message.id))
        else:
            self._ask(connection, message)

    def _pong(self, number: int) -> Pong:
        return Pong(number, is_stopping=self._service.draining, routers=self._peers())

    def _submit(self, connection: ZmqConnection, request: SubmitRequest) -> None:
        number = request.id
        if number in connection.open:
            # Not a `failed`: the open request hears exactly one.
            self.reply(connection, BadMessage(message=f"request {number} is open: its id is taken"))
            return
        if connection.is_cut:
            if len(connection.owed) < MAX_REFUSALS:
                connection.owed.append(_failed(number, OverloadedError(NOT_READ)))
            return
        connection.open[number] = ""
        request_id = self._service.submit(request, connection.tenant, ZmqSink(self, connection))
        if number in connection.open:
            connection.open[number] = request_id
            if connection.is_slow:
                self._service.dispatcher.slow_down(request_id, SLOW_HOLD_S)

    # -- questions ---------------------------------------------------------------------------

    def _ask(
        self,
        connection: ZmqConnection,
        message: QueryHealth
        | TokenizeText
        | DetokenizeIds
        | SetModelSleep
        | SetRole
        | SetObjectives,
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
        elif isinstance(message, SetModelSleep):
            answer = service.sleeping.set_sleep(message)
        elif isinstance(message, SetRole | SetObjectives):
            answer = service.leader_command(message)
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


def _failed(number: int, error: XllmError, request_id: str = "") -> RequestFailed:
    retry_ms = int(error.retry_after_s * 1000) if isinstance(error, OverloadedError) else 0
    return RequestFailed(
        id=number,
        code=error.code,
        message=error.message,
        request_id=request_id,
        param=error.param,
        retry_after_ms=retry_ms,
    )
