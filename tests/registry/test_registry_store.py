"""The embedded registry's pure state: etcd's semantics, leases, history."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm.errors import FencedError, InvalidRequestError, OverloadedError
from xllm.protocol.registry.interface import MAX_KEY_CHARS, MAX_VALUE_BYTES
from xllm.protocol.registry.known import KnownEntries
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import Change, Listing


def test_revisions_grow_and_create_revision_stays():
    store = RegistryStore()
    first = store.put("/a", b"1", 0, 0.0)
    second = store.put("/a", b"2", 0, 0.0)
    assert second == first + 1
    entry = store.get("/a", 0.0)
    assert (entry.create_revision, entry.mod_revision, entry.value) == (first, second, b"2")
    assert store.delete("/a", 0.0)
    third = store.put("/a", b"3", 0, 0.0)
    assert store.get("/a", 0.0).create_revision == third > second + 1


def test_short_leases_are_granted_the_minimum():
    assert RegistryStore().grant(0.1, 0.0).ttl_s == 2.0


def test_a_lapsed_lease_takes_its_keys_at_one_revision():
    store = RegistryStore()
    lease = store.grant(5.0, 0.0)
    store.put("/a", b"", lease.id, 0.0)
    store.put("/b", b"", lease.id, 0.0)
    store.put("/c", b"", 0, 0.0)
    before = store.revision
    assert store.next_expiry() == 5.0
    assert store.keep_alive(lease.id, 4.0) == 5.0
    assert store.get("/a", 8.9) is not None
    assert store.get("/a", 9.0) is None
    assert [entry.key for entry in store.list("/", 9.0).entries] == ["/c"]
    assert store.changes_after("/", before) == (
        Change("/a", before + 1),
        Change("/b", before + 1),
    )
    assert store.keep_alive(lease.id, 9.0) == 0.0
    with pytest.raises(FencedError):
        store.put("/a", b"", lease.id, 9.0)
    store.check()


def test_writing_a_key_moves_it_to_the_new_lease():
    store = RegistryStore()
    old, new = store.grant(5.0, 0.0), store.grant(5.0, 0.0)
    store.put("/a", b"", old.id, 0.0)
    store.put("/a", b"", new.id, 0.0)
    assert store.revoke(old.id, 0.0)
    assert store.get("/a", 0.0).lease_id == new.id
    store.put("/a", b"", 0, 0.0)
    assert store.revoke(new.id, 0.0)
    assert store.get("/a", 100.0).lease_id == 0
    assert not store.revoke(new.id, 0.0)


def test_compare_and_set():
    store = RegistryStore()
    created = store.compare_and_set("/leader", 0, b"one", 0, 0.0)
    assert created.ok
    refused = store.compare_and_set("/leader", 0, b"two", 0, 0.0)
    assert not refused.ok
    assert refused.entry.value == b"one"
    assert refused.entry.create_revision == created.revision
    changed = store.compare_and_set("/leader", created.entry.mod_revision, b"two", 0, 0.0)
    assert changed.ok
    assert changed.entry.create_revision == created.revision
    assert changed.revision == created.revision + 1
    assert store.revision == changed.revision
    assert not store.compare_and_set("/none", 5, b"", 0, 0.0).ok


def test_history_is_bounded_and_says_where_it_ends():
    store = RegistryStore(max_history=3)
    start = store.revision
    for number in range(10):
        store.put("/a", str(number).encode(), 0, 0.0)
    assert store.changes_after("/a", start) is None
    assert store.changes_after("/a", store.revision + 1) is None
    assert [c.entry.value for c in store.changes_after("/a", store.revision - 3)] == [
        b"7",
        b"8",
        b"9",
    ]
    store.compact(store.revision)
    assert store.changes_after("/a", store.revision) == ()
    assert store.changes_after("/a", store.revision - 1) is None
    store.check()


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), 1e9])
def test_bad_times_to_live_are_refused(ttl_s):
    with pytest.raises(InvalidRequestError) as caught:
        RegistryStore().grant(ttl_s, 0.0)
    assert caught.value.param == "ttl_s"


def test_bounds_are_checked_before_anything_is_kept():
    store = RegistryStore(max_keys=1, max_leases=1)
    for key in ("", "x" * (MAX_KEY_CHARS + 1)):
        with pytest.raises(InvalidRequestError):
            store.put(key, b"", 0, 0.0)
    with pytest.raises(InvalidRequestError):
        store.put("/a", b"x" * (MAX_VALUE_BYTES + 1), 0, 0.0)
    assert store.statistics().num_keys == 0
    store.put("/a", b"", 0, 0.0)
    with pytest.raises(OverloadedError):
        store.put("/b", b"", 0, 0.0)
    store.grant(5.0, 0.0)
    with pytest.raises(OverloadedError):
        store.grant(5.0, 0.0)
    store.grant(5.0, 5.0)


def test_a_later_store_gives_later_epochs_and_other_leases():
    old = RegistryStore(first_revision=1000)
    new = RegistryStore(first_revision=2000)
    lease = old.grant(5.0, 0.0)
    assert new.put("/a", b"", 0, 0.0) > old.put("/a", b"", 0, 0.0)
    assert new.keep_alive(lease.id, 0.0) == 0.0


class StoreAgainstModel(RuleBasedStateMachine):
    """Random calls, against a dictionary; a watcher with a short history stays equal."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.store = RegistryStore(max_history=5)
        self.model = {}
        self.leases = {}
        self.known = KnownEntries()
        self.told = {}

    keys = st.sampled_from(["/a", "/ab", "/b", "/x"])
    values = st.binary(max_size=3)

    def _expire(self):
        for lease_id in [one for one, ends in self.leases.items() if ends <= self.now]:
            self._end(lease_id)

    def _end(self, lease_id):
        del self.leases[lease_id]
        self.model = {k: v for k, v in self.model.items() if v[1] != lease_id}

    @rule(data=st.data(), key=keys, value=values)
    def put(self, data, key, value):
        lease_id = data.draw(st.sampled_from([0, *self.leases]))
        self.store.put(key, value, lease_id, self.now)
        self.model[key] = (value, lease_id)

    @rule(key=keys)
    def delete(self, key):
        assert self.store.delete(key, self.now) == (key in self.model)
        self.model.pop(key, None)

    @rule(key=keys, value=values, right=st.booleans())
    def compare_and_set(self, key, value, right):
        entry = self.store.get(key, self.now)
        expected = entry.mod_revision if entry else 0
        result = self.store.compare_and_set(key, expected if right else -1, value, 0, self.now)
        assert result.ok == right
        if right:
            self.model[key] = (value, 0)

    @rule(ttl_s=st.sampled_from([2.0, 5.0]))
    def grant(self, ttl_s):
        lease = self.store.grant(ttl_s, self.now)
        self.leases[lease.id] = self.now + lease.ttl_s

    @rule(data=st.data())
    def keep_or_revoke(self, data):
        if not self.leases:
            return
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        if data.draw(st.booleans()):
            self.leases[lease_id] = self.now + self.store.keep_alive(lease_id, self.now)
        else:
            self.store.revoke(lease_id, self.now)
            self._end(lease_id)

    @rule(seconds=st.sampled_from([0.5, 2.0, 10.0]))
    def wait(self, seconds):
        self.now += seconds
        self.store.expire(self.now)
        self._expire()

    @rule()
    def watch(self):
        changes = self.store.changes_after("/a", self.known.revision)
        if changes is None:
            news = self.known.replace(self.store.list("/a", self.now))
        else:
            news = self.known.apply(changes)
        for change in news:
            if change.entry is None:
                del self.told[change.key]
            else:
                self.told[change.key] = change.entry.value
        assert self.told == {k: v[0] for k, v in self.model.items() if k.startswith("/a")}

    @invariant()
    def same(self):
        self.store.check()
        entries = self.store.list("/", self.now).entries
        assert {e.key: (e.value, e.lease_id) for e in entries} == self.model


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_known_entries_leave_out_what_was_told():
    known = KnownEntries(Listing((), 5))
    store = RegistryStore(first_revision=5)
    store.put("/a", b"1", 0, 0.0)
    changes = store.changes_after("/", 5)
    assert known.apply(changes) == changes
    assert known.apply(changes) == ()
    assert known.replace(store.list("/", 0.0)) == ()
    assert [c.entry for c in known.replace(Listing((), 9))] == [None]
    assert len(known) == 0
