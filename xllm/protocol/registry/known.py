"""What a watcher was told of a prefix: turns changes and listings into what is news to it.

Pure. Invariant: the entries here are exactly those that the changes returned so far add up to,
so a consumer that applies them holds the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.protocol.registry_wire import Change, Entry, Listing


class KnownEntries:
    """The entries of a prefix as told, and the revision up to which they are complete."""

    __slots__ = ("_entries", "revision")

    def __init__(self, listing: Listing | None = None) -> None:
        self._entries: dict[str, Entry] = {}
        self.revision = 0
        if listing is not None:
            self._entries = {entry.key: entry for entry in listing.entries}
            self.revision = listing.revision

    def __len__(self) -> int:
        return len(self._entries)

    def is_like(self, last: Entry | None, count: int) -> bool:
        """Whether these may be entries of which `last` was written last (None: of none)."""
        if last is None or count != len(self._entries):
            return not count and not self._entries
        newest = max(one.mod_revision for one in self._entries.values())
        return self._entries.get(last.key) == last and last.mod_revision == newest

    def apply(self, changes: Sequence[Change]) -> tuple[Change, ...]:
        """Take over changes that follow `revision`; those that were told before are left out."""
        news = tuple(change for change in changes if change.revision > self.revision)
        for change in news:
            if change.entry is None:
                self._entries.pop(change.key, None)
            else:
                self._entries[change.key] = change.entry
        if news:
            self.revision = news[-1].revision
        return news

    def advance(self, revision: int) -> None:
        """Nothing changed up to this revision that was not told."""
        self.revision = max(self.revision, revision)

    def replace(self, listing: Listing, *, keep_missing: bool = False) -> tuple[Change, ...]:
        """Take over a listing: deletions of what is gone (unless those are to be kept), then
        writes by revision. A deletion carries the listing's revision: its own is unknown."""
        listed = {entry.key: entry for entry in listing.entries}
        missing = [key for key in sorted(self._entries) if key not in listed]
        written = [
            Change(key, entry.mod_revision, entry)
            for key, entry in listed.items()
            if self._entries.get(key) != entry
        ]
        written.sort(key=lambda change: change.revision)
        if keep_missing:
            self._entries.update(listed)
            missing.clear()
        else:
            self._entries = listed
        self.revision = listing.revision
        return (*(Change(key, listing.revision) for key in missing), *written)
