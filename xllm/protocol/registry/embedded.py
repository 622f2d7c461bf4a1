"""Serves an in-memory registry to other processes: what stands in for etcd on small clusters.

It decides nothing (see store) and does not know what the entries mean. Invariant: a watch of a
connection is told every change after the revision it named, in order, or that it is lost; one that
does not read is told later.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

import structlog

from xllm.errors import (
    BackpressureError,
    BrokenError,
    OverloadedError,
    PermissionDeniedError,
    XllmError,
)
from xllm.protocol.codec import Decoder
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.ownership import Ownership
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import (
    CasResult,
    CloseWatch,
    CompareAndSet,
    DeleteEntry,
    EntriesChanged,
    EntryAnswer,
    GetEntry,
    GrantLease,
    GuardedWrite,
    KeepLease,
    Lease,
    LeaseAnswer,
    ListEntries,
    ListingAnswer,
    OpenWatch,
    PingRegistry,
    PutEntry,
    RegistryRefused,
    RegistryReply,
    RegistryRequest,
    RevokeLease,
    WatchAnswer,
    WatchLost,
    WriteAnswer,
)
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket

_log = structlog.get_logger("registry")
MAX_WATCHES = 4096
"""Of all connections together."""
_AGAIN_S = 0.2
"""Pause before a watch is told again whose connection takes no more."""


class _ServedWatch:
    """A watch of a connection, and how far it was told."""

    __slots__ = ("prefix", "revision")

    def __init__(self, prefix: str, revision: int) -> None:
        self.prefix = prefix
        self.revision = revision


class EmbeddedRegistryServer:
    """A registry bound at `endpoint`. `registry` is the same one for this process itself.

    Make it inside the running loop; `close` before the loop ends. A new server begins at a
    revision later than any of an earlier one (milliseconds of the wall clock)."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        *,
        store: RegistryStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if store is None:
            store = RegistryStore(first_revision=time.time_ns() // 1_000_000)
        self.incarnation = uuid.uuid4().hex
        self.registry = LocalRegistry(store, clock)
        self.registry.add_listener(self._tell_watches)
        self._store = store
        self._clock = clock
        self._owners = Ownership(store)
        self._transport = transport
        self._refused: set[bytes] = set()
        """Connections that may not write what they tried to, and were named in the log."""
        self._watches: dict[tuple[bytes, int], _ServedWatch] = {}
        self._again: asyncio.TimerHandle | None = None
        self._socket: RouterSocket[RegistryRequest] = RouterSocket(
            transport,
            endpoint,
            Decoder(RegistryRequest),
            self._on_message,
            on_gone=self._on_gone,
            bad_reply=lambda text: RegistryRefused(-1, "bad_message", text),
            denied_reply=lambda message, text: RegistryRefused(
                message.id, PermissionDeniedError.code, text
            ),
            name="registry",
        )

    @property
    def endpoint(self) -> str:
        """The address that was bound."""
        return self._socket.endpoint

    async def close(self) -> None:
        """Stop serving."""
        self._socket.close()
        self._watches.clear()
        if self._again is not None:
            self._again.cancel()
        await self.registry.close()

    def _on_message(self, identity: bytes, message: RegistryRequest, frames: list[bytes]) -> None:
        peer = self._socket.peer(identity)
        try:
            if peer is not None:
                self._owners.check(peer, message, self._clock())
            reply = self._answer(identity, message)
            if peer is not None:
                self._owners.took_effect(peer, message, reply, self._clock())
        except XllmError as error:
            reply = RegistryRefused(message.id, error.code, error.message)
            if isinstance(error, PermissionDeniedError):
                self._note_refused(identity, error)
        try:
            self._socket.send(identity, reply)
        except BrokenError:
            self._on_gone(identity)
        except BackpressureError:
            pass  # it reads nothing: its deadline will tell it
        self.registry.changed()

    def _note_refused(self, identity: bytes, error: PermissionDeniedError) -> None:
        self._transport.num_refused += 1
        if identity not in self._refused:
            self._refused.add(identity)
            _log.error("registry_write_refused", error=error.message)

    def _answer(self, identity: bytes, message: RegistryRequest) -> RegistryReply:
        store, now = self._store, self._clock()
        match message:
            case KeepLease(id, lease_id):
                return LeaseAnswer(id, Lease(lease_id, store.keep_alive(lease_id, now)))
            case GrantLease(id, ttl_s):
                return LeaseAnswer(id, store.grant(ttl_s, now))
            case RevokeLease(id, lease_id):
                return WriteAnswer(id, CasResult(store.revoke(lease_id, now), store.revision))
            case PutEntry(id, key, value, lease_id):
                return WriteAnswer(id, CasResult(True, store.put(key, value, lease_id, now)))
            case GetEntry(id, key):
                return EntryAnswer(id, store.get(key, now))
            case ListEntries(id, prefix):
                return ListingAnswer(id, store.list(prefix, now), self.incarnation)
            case DeleteEntry(id, key):
                return WriteAnswer(id, CasResult(store.delete(key, now), store.revision))
            case CompareAndSet(id, key, expected, value, lease_id):
                result = store.compare_and_set(key, expected, value, lease_id, now)
                return WriteAnswer(id, result)
            case GuardedWrite(id, guard, created, puts, deletes):
                done = store.write_guarded(guard, created, puts, deletes, now)
                return WriteAnswer(id, CasResult(done, store.revision))
            case OpenWatch(id):
                return WatchAnswer(id, self._open_watch(identity, message), self.incarnation)
            case CloseWatch(id, watch):
                self._watches.pop((identity, watch), None)
                return WatchAnswer(id, True, self.incarnation)
            case PingRegistry(id):
                return WatchAnswer(id, True, self.incarnation)

    def _open_watch(self, identity: bytes, message: OpenWatch) -> bool:
        known = message.incarnation == self.incarnation
        reachable = self._store.changes_after(message.prefix, message.after_revision) is not None
        if not (known and reachable):
            return False
        if len(self._watches) >= MAX_WATCHES:
            raise OverloadedError(f"{MAX_WATCHES} watches are the most")
        watch = _ServedWatch(message.prefix, message.after_revision)
        self._watches[identity, message.watch] = watch
        return True

    def _tell_watches(self, now: float) -> None:
        revision = self._store.revision
        for (identity, number), watch in list(self._watches.items()):
            changes = self._store.changes_after(watch.prefix, watch.revision)
            if changes == ():
                watch.revision = revision
                continue
            news = WatchLost(number) if changes is None else EntriesChanged(number, changes)
            try:
                self._socket.send(identity, news)
            except BrokenError:
                self._on_gone(identity)
            except BackpressureError:
                self._tell_again()
            else:
                watch.revision = revision
                if changes is None:
                    self._watches.pop((identity, number), None)

    def _tell_again(self) -> None:
        """Come back to watches that could not be told."""
        if self._again is None:
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(_AGAIN_S, self._retold)

    def _retold(self) -> None:
        self._again = None
        self._tell_watches(self._clock())

    def _on_gone(self, identity: bytes) -> None:
        self._refused.discard(identity)
        for key in [key for key in self._watches if key[0] == identity]:
            del self._watches[key]
