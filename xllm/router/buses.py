"""The buses that a router hears: one subscriber for each publisher, so that a word is its owner's.

A publisher is heard over the connection to the address in its record; where keys are demanded that
is authenticated by the record's key. Words that name another publisher, or are another kind's, are
dropped and counted, and named in the log and in health reports. What words mean is not known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import structlog

from xllm.errors import XllmError
from xllm.protocol.authority import BUS_WORDS, PeerRole
from xllm.protocol.bus import BusMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.records import DaemonRecord, InstanceRecord, RouterRecord
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.pubsub import SubscriberSocket

_log = structlog.get_logger("router")
PublisherRecord = InstanceRecord | DaemonRecord | RouterRecord


@dataclasses.dataclass(slots=True)
class HeardBus:
    """One publisher's. `is_foreign`: something was heard there that is not its own."""

    role: PeerRole
    name: str
    endpoint: str
    key: str
    socket: SubscriberSocket[BusMessage]
    is_foreign: bool = False


class PublisherBuses:
    """All buses of a cluster, as one router hears them."""

    def __init__(self, transport: Transport, on_word: Callable[[BusMessage], None]) -> None:
        self._transport = transport
        self._on_word = on_word
        self._decoder: Decoder[BusMessage] = Decoder(BusMessage)
        self._buses: dict[tuple[PeerRole, str], HeardBus] = {}
        self._unopened: dict[tuple[PeerRole, str], PublisherRecord] = {}
        """Those whose buses could not be opened: tried again by `tick`."""

    def hear(self, record: PublisherRecord) -> None:
        """Listen to a publisher, anew where its address or key changed."""
        role, name, endpoint = role_of(record), record.name, record.bus_endpoint
        key = key_for(endpoint, record.public_key)
        known = self._buses.get((role, name))
        if not endpoint or (known is not None and (known.endpoint, known.key) == (endpoint, key)):
            return
        is_known_fault = self._unopened.get((role, name)) == record
        self.unhear(role, name)
        socket: SubscriberSocket[BusMessage] | None = None
        try:
            socket = SubscriberSocket(
                self._transport,
                self._decoder,
                lambda topic, message: self._heard(bus, message),
                name=f"bus of {role} {name}",
            )
            bus = HeardBus(role, name, endpoint, key, socket)
            socket.connect(endpoint, key, role)
        except XllmError as error:
            if not is_known_fault:
                _log.error("bus_unreachable", publisher=name, error=error.message)
            if socket is not None:
                socket.close()
            self._unopened[role, name] = record
            return
        self._buses[role, name] = bus

    def unhear(self, role: PeerRole, name: str) -> None:
        """Stop listening to a publisher. Unknown ones are ignored."""
        self._unopened.pop((role, name), None)
        bus = self._buses.pop((role, name), None)
        if bus is not None:
            bus.socket.close()

    def tick(self) -> None:
        """Several times a second: what could not be opened (the process may have had no file
        descriptor left) is tried again."""
        for record in tuple(self._unopened.values()):
            self.hear(record)

    def complaints(self) -> tuple[str, ...]:
        """Who speaks as another, for health reports."""
        return tuple(
            f"the bus of {bus.role} {bus.name} says what is not its own: see the log"
            for bus in self._buses.values()
            if bus.is_foreign
        )

    def close(self) -> None:
        """Close every socket."""
        self._unopened.clear()
        for role, name in tuple(self._buses):
            self.unhear(role, name)

    def _heard(self, bus: HeardBus, message: BusMessage) -> None:
        if message.publisher == bus.name and isinstance(message, BUS_WORDS[bus.role]):
            self._on_word(message)
        elif not self._is_known_neighbour(bus, message):
            self._drop(bus, message)

    def _is_known_neighbour(self, bus: HeardBus, message: BusMessage) -> bool:
        """Whether the word is of another publisher of that very address and key: the record of one
        that went stands there beside that of who has its port now. Its own socket hears it too."""
        for other in self._buses.values():
            if other.name == message.publisher and isinstance(message, BUS_WORDS[other.role]):
                return (other.endpoint, other.key) == (bus.endpoint, bus.key)
        return False

    def _drop(self, bus: HeardBus, message: BusMessage) -> None:
        self._transport.num_refused += 1
        if bus.is_foreign:
            return
        bus.is_foreign = True
        _log.error(
            "publisher_speaks_as_another",
            publisher=bus.name,
            role=bus.role,
            endpoint=bus.endpoint,
            says_to_be=message.publisher[:200],
            message=type(message).__name__,
        )


def role_of(record: PublisherRecord) -> PeerRole:
    """What the key of a record's owner must be admitted as."""
    if isinstance(record, InstanceRecord):
        return PeerRole.MASTER
    return PeerRole.DAEMON if isinstance(record, DaemonRecord) else PeerRole.ROUTER


def key_for(endpoint: str, public_key: str) -> str:
    """Keys are for TCP; ipc is guarded by its directory."""
    return public_key if endpoint.startswith("tcp://") else ""
