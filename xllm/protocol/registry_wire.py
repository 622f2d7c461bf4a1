"""Registry and its users: leases, entries, watches, as the embedded registry speaks them.

The parts (`Entry`, `Change`, `Listing`, `Lease`, `CasResult`) are also the values of the
Registry interface, whichever implementation serves it. Revisions are global and only grow; an
entry's `create_revision` is the fencing epoch of whoever created it.
"""

from __future__ import annotations

from xllm.protocol.message import ArrayMessage, ArrayPart, learn


class Lease(ArrayPart, frozen=True):
    """A lease and the time to live that was granted (never less than asked)."""

    id: int
    ttl_s: float


class Entry(ArrayPart, frozen=True):
    """A key and its value. `create_revision`: of the write that made the key; `mod_revision`: of
    its last write; `lease_id`: 0 where it lives until deleted."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


class Change(ArrayPart, frozen=True):
    """A key was written, or (`entry` is None) went away, at this revision."""

    key: str
    revision: int
    entry: Entry | None = None


class Listing(ArrayPart, frozen=True):
    """All entries under a prefix, by key, as of one revision."""

    entries: tuple[Entry, ...]
    revision: int


class CasResult(ArrayPart, frozen=True):
    """Whether the comparison held, and the entry as it is now (None: no such key)."""

    ok: bool
    revision: int
    entry: Entry | None = None


class GrantLease(ArrayMessage, frozen=True):
    """Ask for a lease."""

    id: int
    ttl_s: float


class KeepLease(ArrayMessage, frozen=True):
    """Start a lease's time anew."""

    id: int
    lease_id: int


class RevokeLease(ArrayMessage, frozen=True):
    """End a lease and delete its keys."""

    id: int
    lease_id: int


class PutEntry(ArrayMessage, frozen=True):
    """Write a key."""

    id: int
    key: str
    value: bytes
    lease_id: int = 0


class GetEntry(ArrayMessage, frozen=True):
    """Read a key."""

    id: int
    key: str


class ListEntries(ArrayMessage, frozen=True):
    """Read all keys that begin with a prefix."""

    id: int
    prefix: str


class DeleteEntry(ArrayMessage, frozen=True):
    """Delete a key."""

    id: int
    key: str


class CompareAndSet(ArrayMessage, frozen=True):
    """Write a key if its mod_revision is the expected one (0: if there is no such key)."""

    id: int
    key: str
    expected_mod_revision: int
    value: bytes
    lease_id: int = 0


class GuardedWrite(ArrayMessage, frozen=True):
    """Put and delete keys, under no lease, if the key `guard` was created at that revision."""

    id: int
    guard: str
    create_revision: int
    puts: tuple[tuple[str, bytes], ...] = ()
    deletes: tuple[str, ...] = ()


class OpenWatch(ArrayMessage, frozen=True):
    """Tell this connection of every change under a prefix after a revision of that registry
    incarnation."""

    id: int
    watch: int
    prefix: str
    after_revision: int
    incarnation: str = ""


class CloseWatch(ArrayMessage, frozen=True):
    """No more of that watch."""

    id: int
    watch: int


class PingRegistry(ArrayMessage, frozen=True):
    """Is anybody there?"""

    id: int


RegistryRequest = (
    GrantLease
    | KeepLease
    | RevokeLease
    | PutEntry
    | GetEntry
    | ListEntries
    | DeleteEntry
    | CompareAndSet
    | OpenWatch
    | CloseWatch
    | PingRegistry
    | GuardedWrite
)


class LeaseAnswer(ArrayMessage, frozen=True):
    """A lease granted or kept; `ttl_s` 0: there is no such lease."""

    id: int
    lease: Lease


class EntryAnswer(ArrayMessage, frozen=True):
    """Answer to GetEntry."""

    id: int
    entry: Entry | None = None


class ListingAnswer(ArrayMessage, frozen=True):
    """Answer to ListEntries."""

    id: int
    listing: Listing
    incarnation: str = ""


class WriteAnswer(ArrayMessage, frozen=True):
    """Answer to a write: whether it took effect, the revision since, the entry as it is now."""

    id: int
    result: CasResult


class WatchAnswer(ArrayMessage, frozen=True):
    """Answer to OpenWatch, CloseWatch and PingRegistry. Not `ok`: the history no longer reaches
    back to that revision (or belongs to another incarnation): list and compare."""

    id: int
    ok: bool
    incarnation: str


class EntriesChanged(ArrayMessage, frozen=True):
    """Changes of a watch, in the order of their revisions."""

    watch: int
    changes: tuple[Change, ...]


class WatchLost(ArrayMessage, frozen=True):
    """The history was cut before this watch was told all of it: list, compare, watch anew."""

    watch: int


class RegistryRefused(ArrayMessage, frozen=True):
    """Not done: an error's wire code and message. `id` -1: the frames did not decode."""

    id: int
    code: str
    message: str


RegistryReply = (
    LeaseAnswer
    | EntryAnswer
    | ListingAnswer
    | WriteAnswer
    | WatchAnswer
    | EntriesChanged
    | WatchLost
    | RegistryRefused
)

learn(RegistryRequest, RegistryReply)
