"""Whose the registry's keys and leases are, by the keys of those who made them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.security.keyed_peers import Nodes, run
from xllm.errors import PermissionDeniedError, XllmError
from xllm.protocol.authority import EVERY_ROLE, KnownPeer, PeerRole
from xllm.protocol.records import daemon_key, instance_key, router_key
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.ownership import Ownership
from xllm.protocol.registry.remote import RemoteRegistry
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import (
    CasResult,
    CompareAndSet,
    DeleteEntry,
    GetEntry,
    GrantLease,
    GuardedWrite,
    KeepLease,
    LeaseAnswer,
    PutEntry,
    RevokeLease,
    WriteAnswer,
)

KEY = instance_key("c", "one")


def peer(name, *roles):
    return KnownPeer(name, f"key of {name}", frozenset(roles) or EVERY_ROLE)


def said_by(key, name="", text=""):
    """What the owner of a key registers."""
    return msgspec.msgpack.encode({"name": name, "public_key": key, "text": text})


def record(who, text=""):
    """What a peer registers."""
    return said_by(f"key of {who}", text=text)


class Owned:
    """A store behind its owners, as the embedded registry has them."""

    def __init__(self):
        self.store = RegistryStore()
        self.owners = Ownership(self.store)
        self.now = 0.0

    def ask(self, who, request):
        self.owners.check(who, request, self.now)
        store, now = self.store, self.now
        match request:
            case GrantLease(id, ttl):
                reply = LeaseAnswer(id, store.grant(ttl, now))
            case PutEntry(id, key, value, lease):
                reply = WriteAnswer(id, CasResult(True, store.put(key, value, lease, now)))
            case CompareAndSet(id, key, expected, value, lease):
                reply = WriteAnswer(id, store.compare_and_set(key, expected, value, lease, now))
            case DeleteEntry(id, key):
                reply = WriteAnswer(id, CasResult(store.delete(key, now), store.revision))
            case RevokeLease(id, lease):
                reply = WriteAnswer(id, CasResult(store.revoke(lease, now), store.revision))
            case GuardedWrite(id, guard, created, puts, deletes):
                done = store.write_guarded(guard, created, puts, deletes, now)
                reply = WriteAnswer(id, CasResult(done, store.revision))
            case _:
                return None
        self.owners.took_effect(who, request, reply, now)
        return reply

    def refused(self, who, request):
        with pytest.raises(PermissionDeniedError):
            self.ask(who, request)


def test_who_made_a_key_owns_it_until_it_is_gone():
    owned, one, two = Owned(), peer("one"), peer("two")
    owned.ask(one, PutEntry(1, KEY, record("one", "a")))
    owned.ask(one, PutEntry(1, KEY, record("one", "b")))
    owned.refused(two, PutEntry(1, KEY, record("two")))
    owned.refused(two, DeleteEntry(1, KEY))
    owned.refused(two, CompareAndSet(1, KEY, owned.store.get(KEY, 0.0).mod_revision, record("two")))
    owned.ask(two, GetEntry(1, KEY))
    owned.ask(one, DeleteEntry(1, KEY))
    owned.ask(two, PutEntry(1, KEY, record("two", "c")))
    owned.refused(one, PutEntry(1, KEY, record("one", "d")))
    assert owned.store.get(KEY, 0.0).value == record("two", "c")


def test_what_ends_with_a_lease_is_free_again():
    owned, one, two = Owned(), peer("one"), peer("two")
    lease = owned.ask(one, GrantLease(1, 5.0)).lease.id
    owned.ask(one, PutEntry(1, KEY, record("one"), lease))
    owned.refused(two, KeepLease(1, lease))
    owned.refused(two, RevokeLease(1, lease))
    owned.refused(two, PutEntry(1, instance_key("c", "two"), record("two"), lease))
    owned.now = 100.0
    owned.ask(two, PutEntry(1, KEY, record("two")))
    owned.refused(one, PutEntry(1, KEY, record("one")))


def test_a_comparison_that_fails_makes_nobody_an_owner():
    owned, one, two = Owned(), peer("one"), peer("two")
    owned.store.put(KEY, b"by a process of this node", 0, 0.0)
    assert not owned.ask(one, CompareAndSet(1, KEY, 0, record("one"))).result.ok
    owned.ask(two, PutEntry(1, KEY, record("two")))


def test_a_leaders_write_is_checked_key_by_key():
    owned, one, two = Owned(), peer("one"), peer("two")
    owned.ask(one, PutEntry(1, "/xllm/c/leader", record("one")))
    owned.ask(one, PutEntry(1, KEY, record("one")))
    revision = owned.store.get("/xllm/c/leader", 0.0).create_revision
    owned.ask(two, GuardedWrite(1, "/xllm/c/leader", revision, (("/xllm/c/roles", b"r"),)))
    for puts, deletes in (((("/xllm/c/x", b""), (KEY, b"x")), ()), ((), ("/xllm/c/x", KEY))):
        owned.refused(two, GuardedWrite(1, "/xllm/c/leader", revision, puts, deletes))
    owned.refused(
        peer("m", PeerRole.MASTER),
        GuardedWrite(1, "/xllm/c/leader", revision, deletes=("/xllm/c/roles",)),
    )
    assert owned.store.get("/xllm/c/x", 0.0) is None


@pytest.mark.parametrize("key", [KEY, daemon_key("c", "d"), router_key("c", "r")])
@pytest.mark.parametrize(
    "value",
    [record("two"), said_by(""), b"", b"\x00", b"\x80"],
    ids=["anothers", "nobodys", "empty", "none", "unsaid"],
)
def test_a_process_registers_under_its_own_key(key, value):
    """Else a record could lead routers to another's address as if it were the writer's."""
    owned, one = Owned(), peer("one")
    owned.ask(one, PutEntry(1, "/xllm/c/leader", b"\x80"))
    revision = owned.store.get("/xllm/c/leader", 0.0).create_revision
    for request in (
        PutEntry(1, key, value),
        CompareAndSet(1, key, 0, value),
        GuardedWrite(1, "/xllm/c/leader", revision, ((key, value),)),
    ):
        owned.refused(one, request)
    owned.ask(one, PutEntry(1, key, record("one")))
    owned.refused(one, PutEntry(1, key, value))
    assert owned.store.get(key, 0.0).value == record("one")


def test_who_leads_says_a_name_of_its_own():
    owned, one, two = Owned(), peer("one"), peer("two")
    owned.ask(one, PutEntry(1, router_key("c", "r1"), said_by("key of one", "r1")))
    for request in (PutEntry, lambda *said: CompareAndSet(said[0], said[1], 0, said[2])):
        owned.refused(two, request(1, "/xllm/c/leader", said_by("", "r1")))
    owned.ask(one, PutEntry(1, "/xllm/c/leader", said_by("", "r1")))
    owned.ask(one, DeleteEntry(1, "/xllm/c/leader"))
    # Its own record may have gone with its lease, which is another than that of the leader's key.
    owned.ask(two, PutEntry(1, "/xllm/c/leader", said_by("", "r2")))


@pytest.mark.parametrize(
    ("key", "writers"),
    [
        (KEY, {PeerRole.MASTER}),
        (daemon_key("c", "d"), {PeerRole.DAEMON}),
        (router_key("c", "r"), {PeerRole.ROUTER}),
        ("/xllm/c/leader", {PeerRole.ROUTER}),
        ("/xllm/c/roles/one", {PeerRole.ROUTER, PeerRole.ADMIN}),
        ("/elsewhere", {PeerRole.ROUTER, PeerRole.ADMIN}),
    ],
)
def test_roles_have_their_prefixes(key, writers):
    for role in PeerRole:
        owned, who = Owned(), peer("one", role)
        said = record("one")
        for request in (
            PutEntry(1, key, said),
            CompareAndSet(1, key, 0, said),
            DeleteEntry(1, key),
        ):
            if role in writers:
                owned.ask(who, request)
            else:
                owned.refused(who, request)


class Owners(RuleBasedStateMachine):
    """Three peers write, delete, lease and wait; nothing of one is changed by another."""

    names = st.sampled_from(["a", "b", "c"])
    keys = st.sampled_from([instance_key("c", str(number)) for number in range(4)])

    def __init__(self):
        super().__init__()
        self.owned = Owned()
        self.owner = {}
        self.lease_owner = {}

    def ask(self, name, request, victim):
        """Ask; it must be refused exactly where what it changes is another's."""
        before = dict(self.owned.store._entries)
        foreign = victim not in (None, name)
        try:
            reply = self.owned.ask(peer(name), request)
        except PermissionDeniedError:
            assert foreign
            assert {k: e for k, e in before.items() if k in self.owned.store._entries} == dict(
                self.owned.store._entries
            )
            return None
        except XllmError:
            return None
        assert not foreign
        return reply

    def owner_of(self, key):
        self.owned.store.expire(self.owned.now)
        return self.owner[key] if self.owned.store.get(key, self.owned.now) else None

    @rule(name=names, key=keys, pick=st.integers(0, 5))
    def put(self, name, key, pick):
        mine = [i for i, who in self.lease_owner.items() if who == name]
        lease = mine[pick] if pick < len(mine) else 0
        victim = self.owner_of(key)
        if self.ask(name, PutEntry(1, key, record(name), lease), victim) and victim is None:
            self.owner[key] = name

    @rule(name=names, key=keys)
    def create(self, name, key):
        victim = self.owner_of(key)
        reply = self.ask(name, CompareAndSet(1, key, 0, record(name)), victim)
        if reply and reply.result.ok:
            self.owner[key] = name

    @rule(name=names, key=keys)
    def delete(self, name, key):
        self.ask(name, DeleteEntry(1, key), self.owner_of(key))

    @rule(name=names)
    def grant(self, name):
        self.lease_owner[self.ask(name, GrantLease(1, 2.0), None).lease.id] = name

    @rule(name=names, pick=st.integers(0, 50))
    def revoke(self, name, pick):
        if self.lease_owner:
            lease = list(self.lease_owner)[pick % len(self.lease_owner)]
            self.ask(name, RevokeLease(1, lease), self.lease_owner[lease])

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds):
        self.owned.now += seconds

    @invariant()
    def fits(self):
        self.owned.store.check()


TestOwners = Owners.TestCase
TestOwners.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_what_is_remembered_is_bounded():
    owned, one, two = Owned(), peer("one"), peer("two")
    kept = owned.ask(one, GrantLease(1, 1000.0)).lease.id
    owned.ask(one, PutEntry(1, KEY, record("one"), kept))
    for number in range(6000):
        lease = owned.ask(two, GrantLease(1, 2.0)).lease.id
        owned.ask(two, PutEntry(1, instance_key("c", f"n{number}"), record("two"), lease))
        owned.ask(two, RevokeLease(1, lease))
    assert len(owned.owners._leases) < 2000
    assert len(owned.owners._makers) < 2000
    owned.refused(two, RevokeLease(1, kept))
    owned.refused(two, PutEntry(1, KEY, record("two")))


def test_over_sockets_with_keys(tmp_path):
    async def main():
        nodes = Nodes(tmp_path)
        nodes.admit("one", "master")
        nodes.admit("two", "master")
        nodes.admit("engine", "worker")
        transport = nodes.server()
        server = nodes.keep(EmbeddedRegistryServer(transport, "tcp://127.0.0.1:0"))

        def registry(name):
            return nodes.keep(
                RemoteRegistry(nodes.transport(name), server.endpoint, server_key=nodes.server_key)
            )

        one, two, engine = registry("one"), registry("two"), registry("engine")
        lease = await one.grant(30.0)
        mine, poison = (said_by(nodes.keys[name]) for name in ("one", "two"))
        await one.put(KEY, mine, lease.id)
        for attempt in (
            two.put(KEY, poison),
            two.delete(KEY),
            two.revoke(lease.id),
            two.put(router_key("c", "r"), poison),
            two.put(instance_key("c", "two"), mine),
            engine.put(KEY, poison),
            engine.get(KEY),
        ):
            with pytest.raises(PermissionDeniedError):
                await attempt
        assert transport.num_refused == 7  # of which two have no role for what they say
        assert (await two.get(KEY)).value == mine
        await two.put(instance_key("c", "two"), poison)
        await nodes.close()

    run(main())
