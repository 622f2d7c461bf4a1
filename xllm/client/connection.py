"""A client's connection to a service: the session, a socket and a timer on the running loop.

The low-level interface of the library: a listener is called back for each message, with no queue,
task or future in between. One router is spoken with at a time; when it is lost, stops or falls
silent, what is open goes on at the next. Whether a router is there is for `RouterWatch` to judge;
everything about requests is the session's. Used from its own loop only.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence

import msgspec

from xllm.client.open_request import Listener
from xllm.client.requests import encode_request
from xllm.client.routers import RouterList
from xllm.client.session import ClientSession, ClientStatistics
from xllm.client.watch import RouterWatch, Verdict
from xllm.config.router import RouterSettings
from xllm.errors import (
    BackpressureError,
    BrokenError,
    ClosedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    XllmError,
)
from xllm.protocol.client import ClientMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import AbortRequest, RequestFailed, SubmitRequest
from xllm.protocol.questions import Ping, Pong
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.endpoint import check_public_key

_TICK_S = 0.02
DEFAULT_MAX_REQUEST_BYTES = RouterSettings().max_body_bytes
"""A router cuts the connection of a client that sends more than its `router.max_body_bytes`."""
DEFAULT_SILENCE_S = 1.0


class ClientConnection:
    """Speaks with one router at a time: with one of `endpoints`, or of those that they name where
    `discover` is set.

    `server_key` is the routers' public key where they demand keys; `keys_dir` then holds ours.
    A request of more than `max_request_bytes` is refused here. What is open when a router is lost
    is asked for again at another, and goes on behind the tokens that were heard; it ends with
    BrokenError where no router answers within `connect_timeout_s`. With several routers one that
    says nothing for `silence_s`, while something is open, is as good as lost."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        connect_timeout_s: float = 5.0,
        silence_s: float = DEFAULT_SILENCE_S,
        keys_dir: str = "",
        server_key: str = "",
        max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES,
        discover: bool = True,
    ) -> None:
        if server_key:
            check_public_key(server_key, "server_key")
        self._routers = RouterList(endpoints, server_key, discover=discover)
        self._max_request_bytes = max_request_bytes
        self._loop = asyncio.get_running_loop()
        self._session = ClientSession(time.monotonic())
        self._watch = RouterWatch(connect_timeout_s, silence_s)
        self._random = random.Random()
        self._decoder: Decoder[RouterMessage] = Decoder(RouterMessage)
        self._transport = Transport.with_keys(keys_dir)
        self._closed = False
        self._heard = False
        self._num_refusals = 0
        """Routers in a row that did not know our key."""
        self._is_leaving = False
        """The present router stops, or refused us: the next one is turned to in a moment."""
        self._timer: asyncio.TimerHandle | None = None
        try:
            self._socket = self._open_any()
        except BaseException:
            self._transport.close()
            raise

    @property
    def endpoint(self) -> str:
        """The router spoken with, or tried, at present."""
        return self._routers.present.endpoint

    @property
    def left(self) -> tuple[str, ...]:
        """Why each router but the present one was last turned away from, if it was."""
        return self._routers.left

    @property
    def connected(self) -> bool:
        """Whether a router is there at present."""
        return not self._closed and self._socket.connected

    def next_id(self) -> int:
        """A number for the next request."""
        return self._session.next_id()

    def ask(self, message: ClientMessage, listener: Listener, timeout_s: float) -> None:
        """Send a request or question whose `id` came from `next_id`. A submit without a seed or a
        key gets them here: another router could not go on with it otherwise.

        Raises ClosedError after `close`, BackpressureError where the router does not read,
        InvalidRequestError and PayloadTooLargeError for what no router could read; then the
        listener hears nothing."""
        if self._closed:
            raise ClosedError("this client is closed")
        if type(message) is SubmitRequest:
            message = _with_identity(message)
        data = encode_request(message)
        if len(data) > self._max_request_bytes:
            raise PayloadTooLargeError(
                f"a request of {len(data)} bytes: at most {self._max_request_bytes} are taken"
            )
        now = time.monotonic()
        entry = self._session.open(message, listener, now, timeout_s)
        if self._socket.connected and not self._session.must_wait(message):
            try:
                self._socket.send_encoded(data)
            except BaseException:
                self._session.forget(message.id)
                raise
            entry.is_sent = True
        else:
            self._session.waits(message.id)
        if self._timer is None:
            self._watch.rested(now)
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def abort(self, request_id: int) -> None:
        """Stop a request; its end (or error) follows. Unknown numbers are ignored."""
        abort = self._session.abort(request_id)
        if abort is not None:
            self._send_word(abort)

    def drop(self, request_id: int) -> None:
        """Stop a request and hear nothing more of it."""
        abort = self._session.forget(request_id)
        if abort is not None:
            self._send_word(abort)

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

    # -- routers -------------------------------------------------------------------------------

    def _open_any(self) -> DealerSocket[RouterMessage]:
        """To the present router, or the next one after it that can be tried at all: of one that
        cannot the address is none, or its key was revoked. XllmError: none can."""
        whys: list[XllmError] = []
        for _ in range(len(self._routers)):
            try:
                return self._open_socket()
            except XllmError as error:
                whys.append(error)
                self._routers.pass_by(f"{self.endpoint} cannot be tried: {error.message}")
                self._routers.turn()
        raise whys[0]

    def _open_socket(self) -> DealerSocket[RouterMessage]:
        router = self._routers.present
        self._count_routers()
        self._watch.opened(self._random.random())
        self._is_leaving = False
        return DealerSocket(
            self._transport,
            router.endpoint,
            self._decoder,
            self._receive,
            on_gone=self._lost,
            on_connected=self._connected,
            on_refused=self._refused,
            server_key=router.public_key,
            name="client",
        )

    def _count_routers(self) -> None:
        self._watch.num_routers = self._session.num_routers = len(self._routers)

    def _connected(self) -> None:
        """First a ping: from then on the router tells when it stops."""
        self._num_refusals = 0
        self._send_word(Ping(id=self._session.next_id()))
        self._send_due()

    def _send_due(self) -> None:
        session = self._session
        while self._socket.connected and (found := session.due(time.monotonic())) is not None:
            entry, words = found
            try:
                self._socket.send_encoded(encode_request(words))
            except BackpressureError:
                session.waits(entry.message.id)
                return
            except XllmError as error:
                session.fail(entry.message.id, error)
            else:
                entry.is_sent = True

    def _receive(self, message: RouterMessage, frames: list[bytes]) -> None:
        self._heard = True
        if type(message) is Pong:
            self._routers.learn(message.routers)
            self._count_routers()
            if message.is_stopping and len(self._routers) > 1:
                # Later: this socket is in the middle of its reading.
                self._loop.call_soon(self._leave, self._socket, f"{self.endpoint} stops")
                self._is_leaving = True
                return
        if self._is_leaving and type(message) is RequestFailed:
            return  # a router that stops refuses what comes: the next one is asked instead
        abort = self._session.receive(message)
        if abort is not None:
            self._send_word(abort)

    def _leave(self, socket: DealerSocket[RouterMessage], why: str) -> None:
        if socket is self._socket and not self._closed:
            self._turn(why)

    def _lost(self) -> None:
        self._turn(f"the connection to {self.endpoint} was lost")

    def _refused(self) -> None:
        """The router does not know our key; another may, until each has said so."""
        if self._is_leaving:
            return
        self._num_refusals += 1
        if self._num_refusals < len(self._routers):
            # Later: this socket is in the middle of telling it.
            self._loop.call_soon(self._leave, self._socket, f"{self.endpoint} knows no key of ours")
            self._is_leaving = True
            return
        self._num_refusals = 0
        self._socket.discard_queued()
        self._session.fail_all(PermissionDeniedError(f"{self.endpoint} does not know our key"))

    def _turn(self, why: str) -> None:
        """Go on with what is open at the next router: the same one where there is no other."""
        self._routers.leave(self._socket.reach, why)
        self._socket.close()
        self._session.lost(why)
        self._routers.turn()
        try:
            self._socket = self._open_any()
        except XllmError as error:
            text = f"none of {self._routers} can be tried: {error.message}"
            self._session.fail_all(BrokenError(text))

    def _send_word(self, word: AbortRequest | Ping) -> None:
        try:
            self._socket.send(word)
        except XllmError:
            pass  # a router that does not read or is gone drops the request by itself

    # -- time ----------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        for abort in self._session.expire(now):
            self._send_word(abort)
        if self._session.is_turned_away(now):
            self._turn(f"{self.endpoint} has no instance")
        self._send_due()
        heard, self._heard = self._heard, False
        self._heed(
            self._watch.tick(
                now,
                connected=self._socket.connected,
                heard=heard,
                waiting=self._session.num_open > 0,
            ),
            now,
        )
        if self._session.num_open and not self._closed:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _heed(self, verdict: Verdict, now: float) -> None:
        if verdict is Verdict.PING:
            self._send_word(Ping(id=self._session.next_id()))
        elif verdict is Verdict.NEXT:
            self._turn(f"{self.endpoint} does not answer")
        elif verdict is Verdict.GIVE_UP:
            self._routers.tried(self._socket.reach)
            self._session.fail_all(BrokenError(self._routers.unanswered()))
            self._watch.rested(now)
            self._turn(f"{self.endpoint} does not answer")


def _with_identity(message: SubmitRequest) -> SubmitRequest:
    """The same request with a seed and a key, by which any router can go on with it."""
    drawn = os.urandom(24)
    key = message.key or drawn[:16].hex()
    sampling = message.sampling
    if message.embed or sampling.seed is not None:
        return msgspec.structs.replace(message, key=key)
    seed = int.from_bytes(drawn[16:], "little")
    sampling = msgspec.structs.replace(sampling, seed=seed)
    return msgspec.structs.replace(message, key=key, sampling=sampling)
