"""The buses that a router hears: one subscriber for each publisher, so that a word is its owner's.

A publisher is heard over the connection to the address in its record; where keys are demanded that
is authenticated by the record's key. Words that name another publisher, or are another kind's, are
dropped, and once they cannot be a successor's (`bus_words`) counted, and named in the log and in
health reports. What words mean is not known here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import structlog

from xllm.config.cluster import ClusterSettings
from xllm.errors import XllmError
from xllm.protocol.authority import BUS_WORDS, PeerRole
from xllm.protocol.bus import BusMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.records import DaemonRecord, InstanceRecord, RouterRecord
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.pubsub import SubscriberSocket
from xllm.router.bus_words import BusWords, Verdict

_log = structlog.get_logger("router")
PublisherRecord = InstanceRecord | DaemonRecord | RouterRecord
OUTAGE_S = 15.0
"""How much longer than its lease a record may stand, in a disturbance of the registry."""
_ANY_WORD = tuple(BUS_WORDS.values())


@dataclasses.dataclass(slots=True)
class HeardBus:
    """One publisher's, and what was heard there."""

    role: PeerRole
    name: str
    incarnation: str
    endpoint: str
    key: str
    socket: SubscriberSocket[BusMessage]
    words: BusWords

    def is_of(self, message: BusMessage) -> bool:
        """Whether that is a word of this publisher, under whatever incarnation."""
        return message.publisher == self.name and isinstance(message, BUS_WORDS[self.role])


class PublisherBuses:
    """All buses of a cluster, as one router hears them."""

    def __init__(
        self,
        transport: Transport,
        on_word: Callable[[BusMessage], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease_s = ClusterSettings().lease_s
        """Of the cluster's records."""
        self._clock = clock
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
        if not endpoint:
            return
        if known is not None and (known.endpoint, known.key) == (endpoint, key):
            if known.incarnation != record.incarnation:
                known.incarnation, known.words = record.incarnation, self._no_words()
            return
        is_known_fault = self._unopened.get((role, name)) == record
        self.unhear(role, name)
        try:
            socket = SubscriberSocket(
                self._transport,
                endpoint,
                self._decoder,
                lambda topic, message: self._heard(bus, message),
                server_key=key,
                server_role=role,
                name=f"bus of {role} {name}",
            )
        except XllmError as error:
            if not is_known_fault:
                _log.error("bus_unreachable", publisher=name, error=error.message)
            self._unopened[role, name] = record
            return
        bus = HeardBus(role, name, record.incarnation, endpoint, key, socket, self._no_words())
        self._buses[role, name] = bus

    def unhear(self, role: PeerRole, name: str) -> None:
        """Stop listening to a publisher. Unknown ones are ignored."""
        self._unopened.pop((role, name), None)
        bus = self._buses.pop((role, name), None)
        if bus is not None:
            bus.socket.close()

    def tick(self, *, is_registry_silent: bool = False) -> None:
        """Several times a second: what could not be opened (the process may have had no file
        descriptor left) is tried again. A silent registry cannot tell of a successor."""
        if is_registry_silent:
            for bus in self._buses.values():
                bus.words.wait(self._clock())
        for record in tuple(self._unopened.values()):
            self.hear(record)

    def complaints(self) -> tuple[str, ...]:
        """Who speaks as another, for health reports."""
        return tuple(
            f"the bus of {bus.role} {bus.name} says what is not its own: see the log"
            for bus in self._buses.values()
            if bus.words.is_forged
        )

    def close(self) -> None:
        """Close every socket."""
        self._unopened.clear()
        for role, name in tuple(self._buses):
            self.unhear(role, name)

    def _heard(self, bus: HeardBus, message: BusMessage) -> None:
        owner = bus if bus.is_of(message) else self._neighbour(bus, message)
        if owner is None:
            may_be_heard = isinstance(message, _ANY_WORD)
            verdict = bus.words.foreign(message, self._clock(), may_be_heard=may_be_heard)
            self._judge(bus, verdict)
            return
        if message.incarnation == owner.incarnation:
            self._judge(bus, bus.words.known(message))
        if owner is bus:
            self._on_word(message)

    def _neighbour(self, bus: HeardBus, message: BusMessage) -> HeardBus | None:
        """The other publisher of that very address and key whose word it is: the record of one
        that went stands there beside that of who has its port now. Its own socket hears it too."""
        for other in self._buses.values():
            if other.is_of(message) and (other.endpoint, other.key) == (bus.endpoint, bus.key):
                return other
        return None

    def _judge(self, bus: HeardBus, verdict: Verdict) -> None:
        first, count = verdict
        self._transport.num_refused += count
        if first is None:
            return
        _log.error(
            "publisher_speaks_as_another",
            publisher=bus.name,
            role=bus.role,
            endpoint=bus.endpoint,
            says_to_be=first.publisher[:200],
            message=type(first).__name__,
        )

    def _no_words(self) -> BusWords:
        return BusWords(self.lease_s + OUTAGE_S)


def role_of(record: PublisherRecord) -> PeerRole:
    """What the key of a record's owner must be admitted as."""
    if isinstance(record, InstanceRecord):
        return PeerRole.MASTER
    return PeerRole.DAEMON if isinstance(record, DaemonRecord) else PeerRole.ROUTER


def key_for(endpoint: str, public_key: str) -> str:
    """Keys are for TCP; ipc is guarded by its directory."""
    return public_key if endpoint.startswith("tcp://") else ""
