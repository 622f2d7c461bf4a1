"""What the leader mirrors into the registry: each instance's load, its experts' load, its cache's
digest. Pure.

For people and tools that look at the registry, and for what must be known when every router was
away; no request waits for it. Invariants: a batch is at most MAX_GUARDED_WRITES writes, a value is
written only where it changed, the key that was left alone longest comes first, the keys of
instances that are gone are deleted, and no daemon's word changes a key of an instance of its name.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import structlog

from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import MAX_EXPERT_LOAD_BYTES, DaemonHeartbeat, InstanceHeartbeat
from xllm.protocol.records import experts_key, kv_key, load_key
from xllm.protocol.registry.interface import MAX_GUARDED_WRITES

_log = structlog.get_logger("leadership")

MIRRORED = ("load", "experts", "kv")
"""Kinds of mirrored keys, `<kind>/<instance>`."""
_MS = 1000.0


class Mirror:
    """The mirrored keys of one cluster, as they should be and as they were written."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._wanted: dict[str, bytes] = {}
        self._owner: dict[str, tuple[PeerRole, str]] = {}
        """By key the instance (MASTER) or daemon that it is of."""
        self._written: dict[str, tuple[float, bytes]] = {}
        """By key in the registry: when it was written, and what (before this office: b"")."""
        self._oversized: set[str] = set()
        self.num_oversized = 0
        """Reports of experts that were too large to be mirrored."""

    def begin(self, standing: Iterable[str]) -> None:
        """A new epoch, with those mirrored keys in the registry."""
        self._written = dict.fromkeys(standing, (0.0, b""))

    def heard(self, word: InstanceHeartbeat | DaemonHeartbeat) -> None:
        """An instance or a KV cache daemon speaks."""
        name, load = word.publisher, load_key(self._cluster, word.publisher)
        is_daemon = isinstance(word, DaemonHeartbeat)
        owner = PeerRole.DAEMON if is_daemon else PeerRole.MASTER, name
        if word.num_cached >= 0 and not (is_daemon and load in self._owner):
            self._want(kv_key(self._cluster, name), owner, kv_value(word))
        if isinstance(word, DaemonHeartbeat):
            return
        self._want(load, owner, load_value(word))
        if not word.expert_load:
            return
        if len(word.expert_load) <= MAX_EXPERT_LOAD_BYTES:
            key = experts_key(self._cluster, word.publisher)
            self._want(key, owner, word.expert_load)
            return
        self.num_oversized += 1
        if word.publisher not in self._oversized:
            self._oversized.add(word.publisher)
            _log.warning(
                "expert_load_too_large",
                instance=word.publisher,
                num_bytes=len(word.expert_load),
                limit=MAX_EXPERT_LOAD_BYTES,
            )

    def gone(self, role: PeerRole, name: str) -> None:
        """An instance (MASTER) or a daemon left: its keys are to be deleted."""
        if role is PeerRole.MASTER:
            self._oversized.discard(name)
        for key in [key for key, owner in self._owner.items() if owner == (role, name)]:
            del self._wanted[key], self._owner[key]

    def batch(self) -> tuple[list[tuple[str, bytes]], list[str]]:
        """(puts, deletes) to write now."""
        deletes = [key for key in self._written if key not in self._wanted]
        deletes = deletes[:MAX_GUARDED_WRITES]
        changed = [
            (self._written[key][0] if key in self._written else 0.0, key)
            for key, value in self._wanted.items()
            if key not in self._written or self._written[key][1] != value
        ]
        room = MAX_GUARDED_WRITES - len(deletes)
        return [(key, self._wanted[key]) for _, key in sorted(changed)[:room]], deletes

    def wrote(self, puts: Iterable[tuple[str, bytes]], deletes: Iterable[str], now: float) -> None:
        """The registry has taken them."""
        for key, value in puts:
            self._written[key] = (now, value)
        for key in deletes:
            self._written.pop(key, None)

    def _want(self, key: str, owner: tuple[PeerRole, str], value: bytes) -> None:
        self._wanted[key] = value
        self._owner[key] = owner


def load_value(word: InstanceHeartbeat) -> bytes:
    """An instance's load as a JSON object: times in milliseconds, rounded, so that an idle
    instance's value stays the same."""
    load, latency = word.load, word.latency
    value = {
        "incarnation": word.incarnation,
        "state": word.state,
        "role": word.role,
        "num_waiting": load.num_waiting,
        "num_running": load.num_running,
        "num_offline": load.num_offline,
        "num_free_blocks": load.num_free_blocks,
        "num_blocks": load.num_blocks,
        "waiting_tokens": load.waiting_tokens,
        "running_tokens": load.running_tokens,
        "ttft_ms": round(latency.ttft_mean_s * _MS, 1),
        "tpot_ms": round(latency.tpot_mean_s * _MS, 1),
    }
    return msgspec.json.encode(value)


def kv_value(word: InstanceHeartbeat | DaemonHeartbeat) -> bytes:
    """How many blocks are cached and their digest, 16 hexadecimal digits, as a JSON object."""
    return msgspec.json.encode({"num_cached": word.num_cached, "digest": f"{word.digest:016x}"})
