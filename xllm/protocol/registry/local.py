"""The registry interface straight on a store: for the process that owns the store, and tests.

It decides nothing; the invariant is that a watcher is told each change once, in order, in the
loop and never from within the call that made the change.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from xllm.errors import ClosedError
from xllm.protocol.registry.interface import OnChanges
from xllm.protocol.registry.known import KnownEntries
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import CasResult, Entry, Lease, Listing


class LocalWatch:
    """A watch on a store; tells what is new whenever its registry says so."""

    def __init__(
        self, store: RegistryStore, prefix: str, on_changes: OnChanges, known: KnownEntries
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._on_changes = on_changes
        self._known = known
        self.closed = False

    def tell(self, now: float) -> None:
        """Tell what changed since the last time."""
        if self.closed:
            return
        changes = self._store.changes_after(self._prefix, self._known.revision)
        if changes is None:
            news = self._known.replace(self._store.list(self._prefix, now))
        else:
            news = self._known.apply(changes)
        if news:
            self._on_changes(news)

    def close(self) -> None:
        """No more calls."""
        self.closed = True


class LocalRegistry:
    """A Registry on a store of this process. Leases end when anything next asks, or when their
    time is over and the loop runs."""

    def __init__(
        self, store: RegistryStore | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store = store if store is not None else RegistryStore()
        self._clock = clock
        self._watches: list[LocalWatch] = []
        self._listeners: list[Callable[[float], None]] = []
        self._tell_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def degraded(self) -> bool:
        """Never: the store is here."""
        return False

    async def grant(self, ttl_s: float) -> Lease:
        """See Registry."""
        lease = self.store.grant(ttl_s, self._now())
        self.changed()
        return lease

    async def keep_alive(self, lease_id: int) -> float:
        """See Registry."""
        ttl_s = self.store.keep_alive(lease_id, self._now())
        self.changed()
        return ttl_s

    async def revoke(self, lease_id: int) -> None:
        """See Registry."""
        self.store.revoke(lease_id, self._now())
        self.changed()

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """See Registry."""
        revision = self.store.put(key, value, lease_id, self._now())
        self.changed()
        return revision

    async def get(self, key: str) -> Entry | None:
        """See Registry."""
        return self.store.get(key, self._now())

    async def list(self, prefix: str) -> Listing:
        """See Registry."""
        return self.store.list(prefix, self._now())

    async def delete(self, key: str) -> bool:
        """See Registry."""
        deleted = self.store.delete(key, self._now())
        self.changed()
        return deleted

    async def compare_and_set(
        self, key: str, expected_mod_revision: int, value: bytes, lease_id: int = 0
    ) -> CasResult:
        """See Registry."""
        result = self.store.compare_and_set(
            key, expected_mod_revision, value, lease_id, self._now()
        )
        self.changed()
        return result

    async def write_guarded(
        self,
        guard: str,
        create_revision: int,
        puts: Sequence[tuple[str, bytes]] = (),
        deletes: Sequence[str] = (),
    ) -> bool:
        """See Registry."""
        done = self.store.write_guarded(guard, create_revision, puts, deletes, self._now())
        self.changed()
        return done

    async def watch(
        self,
        prefix: str,
        on_changes: OnChanges,
        *,
        after: Listing | None = None,
        patient: bool = False,
    ) -> LocalWatch:
        """See Registry."""
        watch = LocalWatch(self.store, prefix, on_changes, KnownEntries(after))
        self._watches.append(watch)
        watch.tell(self._now())
        self.changed()
        return watch

    async def close(self) -> None:
        """See Registry."""
        self._closed = True
        for watch in self._watches:
            watch.close()
        self._watches.clear()
        if self._timer is not None:
            self._timer.cancel()

    def add_listener(self, listener: Callable[[float], None]) -> None:
        """`listener(now)` is called in the loop, soon after each change of the store."""
        self._listeners.append(listener)

    def changed(self) -> None:
        """The store was used: tell watches and listeners soon, come back when a lease ends."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        if not self._tell_scheduled:
            self._tell_scheduled = True
            loop.call_soon(self._tell)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        expiry = self.store.next_expiry()
        if expiry is not None:
            delay = max(expiry - self._clock(), 0.0) + 0.01
            self._timer = loop.call_later(delay, self._expire)

    def _tell(self) -> None:
        self._tell_scheduled = False
        if self._closed:
            return
        now = self._clock()
        self._watches = [watch for watch in self._watches if not watch.closed]
        for watch in self._watches:
            watch.tell(now)
        for listener in self._listeners:
            listener(now)

    def _now(self) -> float:
        if self._closed:
            raise ClosedError("the registry is closed")
        return self._clock()

    def _expire(self) -> None:
        self.store.expire(self._clock())
        self.changed()
