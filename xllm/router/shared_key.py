"""The keys of a cluster's routers: each signs with one, so that all know what the others gave out.

The key lies in the registry, made by the first router that finds none. Every router watches it.
Where the registry lost its data they write it back; where another was made meanwhile they sign
with that one, and lay the one from before beside it, so that all verify with both. Invariant: a
router knows every key that it ever signed with, up to MAX_KEYS of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from xllm.config.cluster import ClusterSettings
from xllm.errors import ClosedError, XllmError
from xllm.protocol.records import secret_key
from xllm.protocol.registry.interface import Registry, Watch
from xllm.protocol.registry.waiting import wait_registry
from xllm.protocol.registry_wire import Change

_log = structlog.get_logger("router")
KEY_BYTES = 32
MAX_KEYS = 8
"""That are verified with: the present one, and those of before, the latest of them."""
AGAIN_S = 1.0
MAX_PAUSE_S = 60.0
LATE_S = 5.0
"""What is not in the registry for as long is told in health reports."""


async def shared_key(registry: Registry, cluster: str) -> bytes:
    """The cluster's key. Raises what the registry raises."""
    name = secret_key(cluster, "events")
    entry = await registry.get(name)
    while entry is None:
        await registry.compare_and_set(name, 0, os.urandom(KEY_BYTES))
        entry = await registry.get(name)  # ours, or that of a router that was faster
    return entry.value


class KeyRing:
    """The keys that one router knows, and which of them the registry lacks. Pure. `name`: of the
    present one in the registry; those of before are `name-before/...`."""

    def __init__(self, name: str, key: bytes) -> None:
        self._name = name
        self._present = key
        self._before: dict[bytes, int] = {}
        """With the revision of the registry that made each its entry; oldest first."""
        self._there: set[str] = set()
        """Names that the registry has."""

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The one to sign with, then those that are verified with, too."""
        return self._present, *reversed(self._before)

    def seen(self, name: str, value: bytes | None, revision: int = 0) -> None:
        """The registry has that, made by its write `revision`, or (None) no such key any more."""
        if name != self._name and not name.startswith(f"{self._name}-before/"):
            return
        if value is None:
            self._there.discard(name)
            return
        self._there.add(name)
        if name == self._name and value != self._present:
            self._before.pop(value, None)
            self._keep(self._present, sys.maxsize)  # the latest, until its entry is seen
            self._present = value
        elif name != self._name and value != self._present:
            self._keep(value, revision)

    def owed(self) -> tuple[tuple[str, bytes], ...]:
        """(name, key) of what the registry lacks."""
        wanted = [(self._name, self._present)]
        wanted += [(self._name_of(one), one) for one in self._before]
        return tuple(one for one in wanted if one[0] not in self._there)

    def surplus(self) -> tuple[str, ...]:
        """What lies in the registry and is too old to be verified with."""
        known = {self._name, *map(self._name_of, self.keys)}
        return tuple(sorted(self._there - known))

    def _keep(self, key: bytes, revision: int) -> None:
        known = sorted({**self._before, key: revision}.items(), key=lambda one: one[1])
        self._before = dict(known[1 - MAX_KEYS :])

    def _name_of(self, key: bytes) -> str:
        """A name that tells nothing of the key, and is the same at each router."""
        return f"{self._name}-before/{hashlib.sha256(b'name' + key).hexdigest()[:16]}"


class SharedKeys:
    """The shell around a key ring: it watches the registry, and writes what that lacks (if nobody
    else has). `changed(keys)`: keys to use from now on; `spawn` runs a coroutine."""

    def __init__(
        self,
        registry: Registry,
        cluster: ClusterSettings,
        changed: Callable[[tuple[bytes, ...]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
    ) -> None:
        self._registry = registry
        self._cluster = cluster
        self._changed = changed
        self._spawn = spawn
        self._ring: KeyRing | None = None
        self._watch: Watch | None = None
        self._owes_since = 0.0
        """By the loop's clock; 0: the registry has all."""

    async def join(self) -> None:
        """Know the cluster's key when this returns, and keep it there. TransportError: the registry
        does not answer."""
        cluster, registry = self._cluster, self._registry
        key = await wait_registry(cluster, lambda: shared_key(registry, cluster.name))
        name = secret_key(cluster.name, "events")
        self._ring = KeyRing(name, key)
        self._changed(self._ring.keys)
        self._watch = await wait_registry(cluster, lambda: registry.watch(name, self._told))

    def complaints(self) -> tuple[str, ...]:
        """What is amiss, for health reports."""
        if not self._owes_since or self._now() - self._owes_since < LATE_S:
            return ()
        return ("the registry lacks this router's key of event ids: others may refuse them",)

    def close(self) -> None:
        """Hear no more."""
        if self._watch is not None:
            self._watch.close()

    def _told(self, changes: Sequence[Change]) -> None:
        assert self._ring is not None
        for change in changes:
            if change.entry is None:
                self._ring.seen(change.key, None)
            else:
                self._ring.seen(change.key, change.entry.value, change.entry.create_revision)
        self._changed(self._ring.keys)
        if (self._ring.owed() or self._ring.surplus()) and not self._owes_since:
            self._owes_since = self._now()
            self._spawn(self._write_back(self._ring))

    async def _write_back(self, ring: KeyRing) -> None:
        pause_s = AGAIN_S
        while True:
            owed, surplus = ring.owed(), ring.surplus()
            if not owed and not surplus:
                break
            try:
                for name, key in owed:
                    result = await self._registry.compare_and_set(name, 0, key)
                    entry = result.entry
                    if entry is not None:
                        ring.seen(name, entry.value, entry.create_revision)
                    _log.info("shared_key_written", key=name, was_missing=result.ok)
                for name in surplus:
                    await self._registry.delete(name)
                    ring.seen(name, None)
            except ClosedError:
                return
            except XllmError as error:
                if pause_s == AGAIN_S:  # it may last for ever, where a user has no right to write
                    _log.warning("shared_key_unwritten", error=error.message)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        self._changed(ring.keys)
        self._owes_since = 0.0

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
