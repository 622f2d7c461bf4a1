"""What every registry does: put under lease, read, watch, compare-and-set.

The semantics are etcd's. Revisions are global and only grow. A lease that is not kept alive
ends, and its keys with it. A watch never misses a change and never tells one twice: where an
implementation lost its history or its connection, it lists anew and tells the difference.

Errors: `InvalidRequestError` for a key, value or time out of bounds; `FencedError` for a write
under a lease that is gone; `BrokenError` where the registry does not answer in time (the write
may or may not have happened); `ClosedError` after `close`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from xllm.protocol.registry_wire import CasResult, Change, Entry, Lease, Listing

OnChanges = Callable[[Sequence[Change]], None]
"""Called in the loop with changes in the order of their revisions; must not raise."""

MIN_TTL_S = 2.0
"""Shorter leases are granted this long, as etcd does."""
MAX_TTL_S = 3600.0
MAX_KEY_CHARS = 512
MAX_VALUE_BYTES = 64 << 10
MAX_GUARDED_WRITES = 64
"""Puts and deletes of one guarded write; etcd takes 128 operations a transaction by default."""


class Watch(Protocol):
    """A running watch."""

    def close(self) -> None:
        """No call of `on_changes` after this."""


class Registry(Protocol):
    """A registry, seen from one process. All calls have a deadline of their own."""

    @property
    def degraded(self) -> bool:
        """Whether the registry did not answer of late: serve on with what is known."""

    async def grant(self, ttl_s: float) -> Lease:
        """A new lease of at least this time to live."""

    async def keep_alive(self, lease_id: int) -> float:
        """Start the lease's time anew: its time to live, 0 if the lease is gone."""

    async def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys; unknown ones are ignored."""

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """Write a key, whatever it was: the revision of the write."""

    async def get(self, key: str) -> Entry | None:
        """The entry, or None."""

    async def list(self, prefix: str) -> Listing:
        """All entries whose keys begin with `prefix`, by key."""

    async def delete(self, key: str) -> bool:
        """Whether there was such a key."""

    async def compare_and_set(
        self, key: str, expected_mod_revision: int, value: bytes, lease_id: int = 0
    ) -> CasResult:
        """Write the key if its mod_revision is the expected one (0: if it does not exist)."""

    async def write_guarded(
        self,
        guard: str,
        create_revision: int,
        puts: Sequence[tuple[str, bytes]] = (),
        deletes: Sequence[str] = (),
    ) -> bool:
        """Put (key, value)s, under no lease, and delete keys (those that there are), all at one
        revision, if the key `guard` was created at `create_revision`: whether it was. For a
        leader's writes: none is done once another leads.

        In etcd: one transaction that compares CREATE of `guard` with `create_revision`, its
        success a put or delete_range a key, no failure part. InvalidRequestError for a key named
        twice, more than MAX_GUARDED_WRITES of them, or a key or value out of bounds."""

    async def watch(
        self,
        prefix: str,
        on_changes: OnChanges,
        *,
        after: Listing | None = None,
        patient: bool = False,
    ) -> Watch:
        """Tell every change under `prefix` after that listing of it. Without a listing, the
        present entries are told first, as changes, before this returns.

        `patient`: deletions that may be the work of an outage (leases lapsed, or a registry
        forgot, while the owners live) are told some seconds later, of what is still missing."""

    async def close(self) -> None:
        """End all watches; leases are left to lapse."""
