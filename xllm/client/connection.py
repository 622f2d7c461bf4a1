"""A client's connection to a router: the session, its socket and its timer on the running loop.

The low-level interface of the library: a listener is called back for each message, with no queue,
task or future in between. Decides when a router counts as absent; everything about requests is
the session's. Used from its own loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from xllm.client.requests import encode_request
from xllm.client.session import ClientSession, ClientStatistics, Listener
from xllm.config.settings import RouterSettings
from xllm.errors import (
    BrokenError,
    ClosedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    XllmError,
)
from xllm.protocol.client import AbortRequest, ClientMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.security import Security

_TICK_S = 0.02
DEFAULT_MAX_REQUEST_BYTES = RouterSettings().max_body_bytes
"""A router cuts the connection of a client that sends more than its `router.max_body_bytes`."""


class ClientConnection:
    """Speaks with one router of `endpoints` at a time: the next one after a loss.

    `server_key` is the routers' public key where they demand keys; `keys_dir` then holds ours.
    A request of more than `max_request_bytes` is refused here.
    A request that finds no router within `connect_timeout_s` ends with BrokenError, as do the
    open requests of a connection that is lost."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        connect_timeout_s: float = 5.0,
        keys_dir: str = "",
        server_key: str = "",
        max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES,
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._turn = 0
        self._connect_timeout_s = connect_timeout_s
        self._server_key = server_key
        self._max_request_bytes = max_request_bytes
        self._loop = asyncio.get_running_loop()
        self._session = ClientSession()
        self._decoder: Decoder[RouterMessage] = Decoder(RouterMessage)
        self._transport = Transport(Security.load(keys_dir) if keys_dir else None)
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._absent_since: float | None = None
        try:
            self._socket = self._open_socket()
        except BaseException:
            self._transport.close()
            raise

    @property
    def endpoint(self) -> str:
        """The router spoken with, or tried, at present."""
        return self._endpoints[self._turn]

    @property
    def connected(self) -> bool:
        """Whether a router is there at present."""
        return not self._closed and self._socket.connected

    def next_id(self) -> int:
        """A number for the next request."""
        return self._session.next_id()

    def ask(self, message: ClientMessage, listener: Listener, timeout_s: float) -> None:
        """Send a request or question whose `id` came from `next_id`.

        Raises ClosedError after `close`, BackpressureError where the router does not read,
        InvalidRequestError and PayloadTooLargeError for what no router could read; then the
        listener hears nothing."""
        if self._closed:
            raise ClosedError("this client is closed")
        data = encode_request(message)
        if len(data) > self._max_request_bytes:
            raise PayloadTooLargeError(
                f"a request of {len(data)} bytes: at most {self._max_request_bytes} are taken"
            )
        self._session.open(message.id, listener, time.monotonic(), timeout_s)
        try:
            self._socket.send_encoded(data)
        except BaseException:
            self._session.forget(message.id)
            raise
        if self._timer is None:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def abort(self, request_id: int) -> None:
        """Stop a request; its end (or error) follows. Unknown numbers are ignored."""
        if self._session.is_open(request_id):
            self._send_abort(AbortRequest(id=request_id))

    def drop(self, request_id: int) -> None:
        """Stop a request and hear nothing more of it."""
        abort = self._session.forget(request_id)
        if abort is not None:
            self._send_abort(abort)

    def statistics(self) -> ClientStatistics:
        """Counts of the session."""
        return self._session.statistics()

    def check(self) -> None:
        """InvariantError where the session's state cannot be."""
        self._session.check()

    def close(self) -> None:
        """Close the socket; open requests end with ClosedError. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close()
        self._transport.close()
        self._session.fail_all(ClosedError("the client was closed"))

    def _open_socket(self) -> DealerSocket[RouterMessage]:
        return DealerSocket(
            self._transport,
            self.endpoint,
            self._decoder,
            self._receive,
            on_gone=self._lost,
            on_refused=self._refused,
            server_key=self._server_key,
            name="client",
        )

    def _receive(self, message: RouterMessage, frames: list[bytes]) -> None:
        abort = self._session.receive(message)
        if abort is not None:
            self._send_abort(abort)

    def _lost(self) -> None:
        lost = self.endpoint
        self._next_endpoint()
        self._session.fail_all(BrokenError(f"the connection to {lost} was lost"))

    def _refused(self) -> None:
        self._socket.discard_queued()
        self._session.fail_all(PermissionDeniedError(f"{self.endpoint} does not know our key"))

    def _next_endpoint(self) -> None:
        """Forget what waits for the present router and turn to the next."""
        self._socket.discard_queued()
        if len(self._endpoints) > 1:
            self._socket.close()
            self._turn = (self._turn + 1) % len(self._endpoints)
            self._socket = self._open_socket()

    def _send_abort(self, abort: AbortRequest) -> None:
        try:
            self._socket.send(abort)
        except XllmError:
            pass  # a router that does not read or is gone drops the request by itself

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        for abort in self._session.expire(now):
            if self._socket.connected:
                self._send_abort(abort)
        self._watch_absence(now)
        if self._session.num_open and not self._closed:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _watch_absence(self, now: float) -> None:
        if self._socket.connected or not self._session.num_open:
            self._absent_since = None
        elif self._absent_since is None:
            self._absent_since = now
        elif now - self._absent_since >= self._connect_timeout_s:
            tried = ", ".join(self._endpoints)
            self._absent_since = None
            self._next_endpoint()
            self._session.fail_all(BrokenError(f"no router answers at {tried}"))
