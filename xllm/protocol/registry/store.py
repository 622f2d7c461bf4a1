"""The embedded registry's state: keys, leases and a bounded history. Pure; time is passed in.

It does not know who asks or watches. Invariant: revisions only grow, every write of one call has
one revision, the history is ordered and complete after `compacted`, and a key under a lease lives
exactly as long as the lease (or until deleted or written again).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Sequence

from xllm.errors import FencedError, InvariantError, OverloadedError
from xllm.protocol.registry.bounds import check_guarded, check_ttl, check_write
from xllm.protocol.registry.interface import MIN_TTL_S
from xllm.protocol.registry_wire import CasResult, Change, Entry, Lease, Listing


@dataclasses.dataclass(frozen=True, slots=True)
class RegistryStatistics:
    """A snapshot of the store's counts."""

    num_keys: int
    num_leases: int
    revision: int
    compacted: int


class _HeldLease:
    """A living lease: when it ends and what ends with it."""

    __slots__ = ("expires_at", "keys", "ttl_s")

    def __init__(self, ttl_s: float, now: float) -> None:
        self.ttl_s = ttl_s
        self.expires_at = now + ttl_s
        self.keys: set[str] = set()


class RegistryStore:
    """Keys, leases, history. `first_revision` must exceed any that an earlier store of the same
    cluster has given out, so that fencing epochs and lease ids grow across restarts too."""

    def __init__(
        self,
        *,
        first_revision: int = 1,
        max_history: int = 4096,
        max_keys: int = 65536,
        max_leases: int = 65536,
    ) -> None:
        self._revision = first_revision
        self._compacted = first_revision
        self._last_lease = first_revision
        self._max_history = max_history
        self._max_keys = max_keys
        self._max_leases = max_leases
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _HeldLease] = {}
        self._history: deque[Change] = deque()

    @property
    def revision(self) -> int:
        """Revision of the last write."""
        return self._revision

    def grant(self, ttl_s: float, now: float) -> Lease:
        """A new lease; InvalidRequestError out of bounds, OverloadedError beyond `max_leases`."""
        check_ttl(ttl_s)
        self.expire(now)
        if len(self._leases) >= self._max_leases:
            raise OverloadedError(f"{self._max_leases} leases are the most", param="ttl_s")
        self._last_lease += 1
        ttl_s = max(ttl_s, MIN_TTL_S)
        self._leases[self._last_lease] = _HeldLease(ttl_s, now)
        return Lease(self._last_lease, ttl_s)

    def keep_alive(self, lease_id: int, now: float) -> float:
        """Start the lease's time anew: its time to live, 0 if it is gone."""
        self.expire(now)
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0.0
        lease.expires_at = now + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: int, now: float) -> bool:
        """End a lease and delete its keys, all at one revision."""
        self.expire(now)
        return self._end_lease(lease_id)

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        lapsed = [key for key, lease in self._leases.items() if lease.expires_at <= now]
        for lease_id in lapsed:
            self._end_lease(lease_id)

    def next_expiry(self) -> float | None:
        """When the next lease ends if nobody keeps it alive."""
        return min((lease.expires_at for lease in self._leases.values()), default=None)

    def put(self, key: str, value: bytes, lease_id: int, now: float) -> int:
        """Write a key: the revision. FencedError if the lease is gone."""
        self.expire(now)
        self._check_write(key, value, lease_id)
        return self._write(key, value, lease_id).mod_revision

    def get(self, key: str, now: float) -> Entry | None:
        """The entry, or None."""
        self.expire(now)
        return self._entries.get(key)

    @property
    def lease_ids(self) -> Collection[int]:
        """The leases as of the last call that named the time."""
        return self._leases.keys()

    def list(self, prefix: str, now: float) -> Listing:
        """The entries under a prefix, by key."""
        self.expire(now)
        keys = sorted(key for key in self._entries if key.startswith(prefix))
        return Listing(tuple(self._entries[key] for key in keys), self._revision)

    def delete(self, key: str, now: float) -> bool:
        """Whether there was such a key."""
        self.expire(now)
        if key not in self._entries:
            return False
        self._revision += 1
        self._remove(key)
        self._trim()
        return True

    def compare_and_set(
        self, key: str, expected_mod_revision: int, value: bytes, lease_id: int, now: float
    ) -> CasResult:
        """Write the key if its mod_revision is the expected one (0: no such key)."""
        self.expire(now)
        self._check_write(key, value, lease_id)
        entry = self._entries.get(key)
        if (entry.mod_revision if entry is not None else 0) != expected_mod_revision:
            return CasResult(False, self._revision, entry)
        entry = self._write(key, value, lease_id)
        return CasResult(True, self._revision, entry)

    def write_guarded(
        self,
        guard: str,
        create_revision: int,
        puts: Sequence[tuple[str, bytes]],
        deletes: Sequence[str],
        now: float,
    ) -> bool:
        """Put and delete at one revision if `guard` was created at that one: whether it was."""
        self.expire(now)
        check_guarded(puts, deletes)
        for key, value in puts:
            self._check_write(key, value, 0)
        entry = self._entries.get(guard)
        if entry is None or entry.create_revision != create_revision:
            return False
        present = [key for key in deletes if key in self._entries]
        if puts or present:
            self._revision += 1
        for key, value in puts:
            self._put_at_revision(key, value, 0)
        for key in present:
            self._remove(key)
        self._trim()
        return True

    def changes_after(self, prefix: str, revision: int) -> tuple[Change, ...] | None:
        """The changes under a prefix after a revision; None if the history does not reach back
        that far (or the revision was never given out)."""
        if revision < self._compacted or revision > self._revision:
            return None
        found: list[Change] = []
        for change in reversed(self._history):
            if change.revision <= revision:
                break
            if change.key.startswith(prefix):
                found.append(change)
        found.reverse()
        return tuple(found)

    def compact(self, revision: int) -> None:
        """Forget the history up to and including `revision`."""
        self._compacted = max(self._compacted, min(revision, self._revision))
        while self._history and self._history[0].revision <= self._compacted:
            self._history.popleft()

    def statistics(self) -> RegistryStatistics:
        """A snapshot of the counts."""
        return RegistryStatistics(
            num_keys=len(self._entries),
            num_leases=len(self._leases),
            revision=self._revision,
            compacted=self._compacted,
        )

    def check(self) -> None:
        """Raise InvariantError if keys, leases and history do not fit together."""
        for key, entry in self._entries.items():
            if not entry.create_revision <= entry.mod_revision <= self._revision:
                raise InvariantError(f"revisions of {entry} against {self._revision}")
            lease = self._leases.get(entry.lease_id)
            if entry.lease_id and (lease is None or key not in lease.keys):
                raise InvariantError(f"{entry} is not under its lease")
        for lease_id, lease in self._leases.items():
            for key in lease.keys:
                held = self._entries.get(key)
                if held is None or held.lease_id != lease_id:
                    raise InvariantError(f"lease {lease_id} holds {key}, which is {held}")
        last = self._compacted
        for change in self._history:
            if change.revision < last or change.revision > self._revision:
                raise InvariantError(f"{change} is out of order after revision {last}")
            last = change.revision

    def _check_write(self, key: str, value: bytes, lease_id: int) -> None:
        check_write(key, value)
        if lease_id and lease_id not in self._leases:
            raise FencedError(f"lease {lease_id} is gone", param="lease_id")
        if key not in self._entries and len(self._entries) >= self._max_keys:
            raise OverloadedError(f"{self._max_keys} keys are the most", param="key")

    def _write(self, key: str, value: bytes, lease_id: int) -> Entry:
        self._revision += 1
        entry = self._put_at_revision(key, value, lease_id)
        self._trim()
        return entry

    def _put_at_revision(self, key: str, value: bytes, lease_id: int) -> Entry:
        old = self._entries.get(key)
        created = old.create_revision if old is not None else self._revision
        if old is not None and old.lease_id:
            self._leases[old.lease_id].keys.discard(key)
        if lease_id:
            self._leases[lease_id].keys.add(key)
        entry = Entry(key, value, created, self._revision, lease_id)
        self._entries[key] = entry
        self._history.append(Change(key, self._revision, entry))
        return entry

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key)
        lease = self._leases.get(entry.lease_id)
        if lease is not None:
            lease.keys.discard(key)
        self._history.append(Change(key, self._revision))

    def _end_lease(self, lease_id: int) -> bool:
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        if lease.keys:
            self._revision += 1
            for key in sorted(lease.keys):
                self._remove(key)
            self._trim()
        return True

    def _trim(self) -> None:
        if len(self._history) > self._max_history:
            self.compact(self._history[len(self._history) - self._max_history - 1].revision)
