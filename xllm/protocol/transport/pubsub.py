"""Publishing and subscribing: the topic is the first frame, the message the second.

A publisher drops what a slow subscriber does not read, without a word: receivers find gaps by
the messages' own sequence numbers and ask for a snapshot.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import zmq

from xllm.errors import BadMessageError
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.transport.channel import Channel
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.limits import SocketLimits

T = TypeVar("T")


class PublisherSocket(Channel):
    """Binds `endpoint` and publishes to everybody who subscribed."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        *,
        limits: SocketLimits | None = None,
        name: str = "",
    ) -> None:
        super().__init__(transport, zmq.PUB, limits or SocketLimits(), name or endpoint)
        self.endpoint = self._bind(endpoint)

    def publish(self, topic: bytes, message: msgspec.Struct) -> None:
        """Send to the topic's subscribers, as far as they keep up."""
        self._send(b"", (topic, encode(message)))

    def _receive(self, parts: list[bytes]) -> None:
        raise AssertionError("a publisher hears nothing")

    def _receive_one(self) -> bool:
        # Reading the events lets ZeroMQ process subscriptions; a PUB has nothing to receive.
        self._socket.getsockopt(zmq.EVENTS)
        return False


class SubscriberSocket(Channel, Generic[T]):
    """Hears all topics of the publishers that it is connected to."""

    def __init__(
        self,
        transport: Transport,
        decoder: Decoder[T],
        on_message: Callable[[bytes, T], None],
        *,
        limits: SocketLimits | None = None,
        name: str = "subscriber",
    ) -> None:
        super().__init__(transport, zmq.SUB, limits or SocketLimits(), name)
        self._decode = decoder.decode
        self._on_message = on_message
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")

    def connect(self, endpoint: str, server_key: str = "") -> None:
        """Hear one more publisher; its address need not exist yet. BrokenError or ConfigError
        for an address that cannot be; the others are heard all the same."""
        self._connect(endpoint, server_key)

    def disconnect(self, endpoint: str) -> None:
        """Stop hearing a publisher. Unknown addresses are ignored."""
        try:
            self._socket.disconnect(endpoint)
        except zmq.ZMQError as error:
            if error.errno != errno.ENOENT:
                raise

    def _receive(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            self._num_bad += 1
            return
        try:
            message = self._decode(parts[1])
        except BadMessageError:
            self._num_bad += 1
            return
        self._on_message(parts[0], message)
