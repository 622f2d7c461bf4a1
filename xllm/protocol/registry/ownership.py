"""Whose keys and leases the registry holds. Pure.

A peer is known by its public key. Who makes a key owns it until it is gone, and who is granted a
lease owns that: nobody else may change either. Who registers says its own key, and who leads its
own name. Where there are no keys everybody is one user, and nobody asks here.
"""

from __future__ import annotations

from xllm.errors import BadMessageError, PermissionDeniedError
from xllm.protocol.authority import KnownPeer, rule_of
from xllm.protocol.codec import Decoder
from xllm.protocol.message import MapPart
from xllm.protocol.records import router_key
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import (
    CompareAndSet,
    DeleteEntry,
    Entry,
    GrantLease,
    GuardedWrite,
    KeepLease,
    LeaseAnswer,
    PutEntry,
    RegistryReply,
    RegistryRequest,
    RevokeLease,
    WriteAnswer,
)

_SPARE = 1024
"""Owners of what is gone that may be remembered, beside as many as there are of what is not."""


class _Said(MapPart, frozen=True):
    """What records say of who wrote them."""

    name: str = ""
    public_key: str = ""


class Ownership:
    """Owners by key and by lease of one store; told what took effect there."""

    def __init__(self, store: RegistryStore) -> None:
        self._store = store
        self._makers: dict[str, tuple[int, str]] = {}
        """By key: the revision that made it, and who did."""
        self._leases: dict[int, str] = {}
        self._decoder: Decoder[_Said] = Decoder(_Said)

    def check(self, peer: KnownPeer, request: RegistryRequest, now: float) -> None:
        """PermissionDeniedError where the peer may not do that."""
        if isinstance(request, KeepLease | RevokeLease):
            self._check_lease(peer, request.lease_id)
            return
        for key in _written_keys(request):
            self._check_write(peer, key, now)
        if isinstance(request, PutEntry | CompareAndSet):
            self._check_lease(peer, request.lease_id)
            self._check_record(peer, request.key, request.value, now)
        elif isinstance(request, GuardedWrite):
            for key, value in request.puts:
                self._check_record(peer, key, value, now)

    def took_effect(
        self, peer: KnownPeer, request: RegistryRequest, reply: RegistryReply, now: float
    ) -> None:
        """Note who made what `request` made, if it made anything."""
        if isinstance(reply, LeaseAnswer) and isinstance(request, GrantLease):
            self._leases[reply.lease.id] = peer.public_key
            if len(self._leases) > 2 * self._store.statistics().num_leases + _SPARE:
                held = self._store.lease_ids
                self._leases = {i: who for i, who in self._leases.items() if i in held}
        elif isinstance(reply, WriteAnswer) and reply.result.ok:
            for key in _written_keys(request):
                self._written(peer, key, now)

    def _written(self, peer: KnownPeer, key: str, now: float) -> None:
        entry = self._store.get(key, now)
        if entry is None or entry.mod_revision != entry.create_revision:
            return
        if self._makers.get(key, (0, ""))[0] != entry.create_revision:
            self._makers[key] = (entry.create_revision, peer.public_key)
        if len(self._makers) > 2 * self._store.statistics().num_keys + _SPARE:
            kept = {key: made for key, made in self._makers.items() if self._store.get(key, now)}
            self._makers = kept

    def _check_write(self, peer: KnownPeer, key: str, now: float) -> None:
        rule = rule_of(key)
        if peer.roles.isdisjoint(rule.writers):
            raise PermissionDeniedError(f"{peer.name} may not write {key}", param="key")
        entry = self._store.get(key, now)
        if rule.owned and entry is not None and self._maker(entry) not in ("", peer.public_key):
            raise PermissionDeniedError(f"{key} is not {peer.name}'s", param="key")

    def _check_record(self, peer: KnownPeer, key: str, value: bytes, now: float) -> None:
        """A process registers under its own key; and who leads, by the name that is its own."""
        kind = rule_of(key)
        parts = key.split("/")
        if not kind.is_record and parts[3:] != ["leader"]:
            return
        try:
            said = self._decoder.decode(value)
        except BadMessageError as error:
            raise PermissionDeniedError(f"{key}: {error.message}", param="value") from error
        if kind.is_record:
            if said.public_key != peer.public_key:
                raise PermissionDeniedError(
                    f"{key} names another key than {peer.name}'s", param="value"
                )
            return
        record = self._store.get(router_key(parts[2], said.name), now)
        if record is not None and self._maker(record) not in ("", peer.public_key):
            raise PermissionDeniedError(
                f"{key} names the router {said.name}, which is not {peer.name}", param="value"
            )

    def _maker(self, entry: Entry) -> str:
        """Who made what the key holds now; "" where that is not known."""
        revision, maker = self._makers.get(entry.key, (0, ""))
        return maker if revision == entry.create_revision else ""

    def _check_lease(self, peer: KnownPeer, lease_id: int) -> None:
        if self._leases.get(lease_id, peer.public_key) != peer.public_key:
            raise PermissionDeniedError(f"lease {lease_id} is not {peer.name}'s", param="lease_id")


def _written_keys(request: RegistryRequest) -> tuple[str, ...]:
    """The keys that a request would write or delete by name."""
    if isinstance(request, PutEntry | DeleteEntry | CompareAndSet):
        return (request.key,)
    if isinstance(request, GuardedWrite):
        return (*(key for key, _ in request.puts), *request.deletes)
    return ()
