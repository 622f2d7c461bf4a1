"""What a watch on etcd tells, whatever happens to its streams: against a store as the truth."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.registry.watcher import Told
from xllm.errors import BrokenError
from xllm.protocol.registry import etcd_watch
from xllm.protocol.registry.etcd_stubs import kv_pb2, rpc_pb2
from xllm.protocol.registry.etcd_watch import EtcdWatch
from xllm.protocol.registry.etcd_wire import list_request, range_end
from xllm.protocol.registry.known import KnownEntries
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import Entry, Listing

PREFIX = "/w/"
TTL_S = 1000.0


def as_kv(entry):
    return kv_pb2.KeyValue(
        key=entry.key.encode(),
        value=entry.value,
        create_revision=entry.create_revision,
        mod_revision=entry.mod_revision,
        lease=entry.lease_id,
    )


def as_event(change):
    if change.entry is not None:
        return kv_pb2.Event(type=kv_pb2.Event.PUT, kv=as_kv(change.entry))
    kv = kv_pb2.KeyValue(key=change.key.encode(), mod_revision=change.revision)
    return kv_pb2.Event(type=kv_pb2.Event.DELETE, kv=kv)


class FakeEtcd:
    """A store, and the streams that are open on it. `behind`: the next stream is of a member that
    has not heard of the last writes yet."""

    def __init__(self):
        self.store = RegistryStore(max_history=10_000)
        self.cluster_id = 1
        self.streams = []
        self.disturbed_s = 0.0
        self.num_doubts = 0
        self.behind = False

    # the connection, as a watch sees it

    async def wait_link(self):
        await asyncio.sleep(0)
        return self

    async def read(self, ask):
        return await ask(self, 1.0)

    def disturb(self):
        self.disturbed_s = 0.02

    def doubt(self):
        self.num_doubts += 1

    # the link

    class kv:
        Range = "Range"

    async def call(self, method, request, limit_s):
        assert method == "Range"
        assert (request.key, request.range_end) == (PREFIX.encode(), b"/w0")
        listing = self.store.list(PREFIX, 0.0)
        return rpc_pb2.RangeResponse(header=self.header(), kvs=map(as_kv, listing.entries))

    async def authenticate_again(self):
        pass

    def open_watch(self, request):
        stream = FakeStream(self, request)
        self.streams.append(stream)
        return stream

    # what tests do

    def header(self, revision=None):
        known = self.store.revision if revision is None else revision
        return rpc_pb2.ResponseHeader(cluster_id=self.cluster_id, revision=known)

    def changed(self):
        for stream in self.streams:
            stream.news.set()

    def cut(self):
        for stream in list(self.streams):
            stream.close()


class FakeStream:
    """etcd's side of a watch: created, then what follows its revision."""

    def __init__(self, etcd, request):
        self._etcd = etcd
        self._queue = []
        self.news = asyncio.Event()
        self.closed = False
        create = request.create_request
        assert (create.key, create.range_end) == (PREFIX.encode(), range_end(PREFIX))
        assert create.progress_notify
        self._revision = create.start_revision - 1
        header = self._etcd.header()
        if self._etcd.behind:
            self._etcd.behind = False
            header = self._etcd.header(max(self._revision - 1, 0))
        self._queue.append(rpc_pb2.WatchResponse(header=header, created=True))

    async def read(self):
        while True:
            if self.closed:
                raise BrokenError("cut")
            if self._queue:
                return self._queue.pop(0)
            store = self._etcd.store
            if self._revision < store.statistics().compacted:
                self._revision = store.revision
                return rpc_pb2.WatchResponse(
                    header=self._etcd.header(), canceled=True, compact_revision=1
                )
            changes = store.changes_after(PREFIX, min(self._revision, store.revision))
            if self._revision < store.revision:
                self._revision = store.revision
                # Without changes under the prefix, this is what progress looks like.
                return rpc_pb2.WatchResponse(
                    header=self._etcd.header(), events=map(as_event, changes)
                )
            self.news.clear()
            await self.news.wait()

    def progress(self):
        self._queue.append(rpc_pb2.WatchResponse(header=self._etcd.header()))
        self.news.set()

    def cancel(self, reason):
        self._queue.append(rpc_pb2.WatchResponse(canceled=True, cancel_reason=reason))
        self.news.set()

    def close(self):
        self.closed = True
        self.news.set()
        if self in self._etcd.streams:
            self._etcd.streams.remove(self)


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 4)),
    st.tuples(st.just("delete"), st.integers(0, 4)),
    st.tuples(st.just("other"), st.integers(0, 1)),
    st.tuples(
        st.sampled_from(["cut", "compact", "let", "progress", "behind", "cancel", "disturb"]),
        st.just(0),
    ),
)


async def settle(told, etcd, seconds=5.0):
    """Until what was told is what there is."""

    def equal():
        listing = etcd.store.list(PREFIX, 0.0)
        return told.entries == {entry.key: entry for entry in listing.entries}

    async with asyncio.timeout(seconds):
        while not equal():
            await asyncio.sleep(0.001)


async def do(etcd, what, number):
    store = etcd.store
    match what:
        case "put":
            store.put(f"{PREFIX}{number}", str(store.revision).encode(), 0, 0.0)
        case "delete":
            store.delete(f"{PREFIX}{number}", 0.0)
        case "other":
            store.put(f"/other/{number}", b"", 0, 0.0)
        case "cut":
            etcd.cut()
        case "compact":
            store.compact(store.revision)
        case "let":
            for _ in range(5):
                await asyncio.sleep(0)
        case "progress":
            # Only a stream that was told everything gets one.
            etcd.changed()
            for _ in range(5):
                await asyncio.sleep(0)
            for stream in etcd.streams:
                stream.progress()
        case "behind":
            etcd.behind = True
        case "cancel":
            for stream in etcd.streams:
                stream.cancel("etcdserver: permission denied")
        case "disturb":
            etcd.disturbed_s = 0.02 if not etcd.disturbed_s else 0.0
    etcd.changed()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(etcd_watch, "AGAIN_S", 0.0)


def watched(etcd, told, after=None, patient=True):
    return EtcdWatch(etcd, PREFIX, told, after, lambda watch: None, patient=patient)


@given(st.lists(OPERATIONS, max_size=40), st.booleans(), st.booleans())
@settings(max_examples=80)
def test_what_was_told_is_what_there_is(operations, with_listing, patient):
    async def main():
        etcd, told = FakeEtcd(), Told()
        etcd.store.put(f"{PREFIX}0", b"first", 0, 0.0)
        after = None
        if with_listing:
            after = etcd.store.list(PREFIX, 0.0)
            told.entries = {entry.key: entry for entry in after.entries}
        watch = watched(etcd, told, after, patient)
        await watch.start()
        for what, number in operations:
            await do(etcd, what, number)
        etcd.disturbed_s = 0.0
        await settle(told, etcd)
        watch.close()
        await asyncio.gather(watch.task, return_exceptions=True)

    asyncio.run(main())


def test_an_idle_watch_resumes_where_progress_said_it_was():
    async def main():
        etcd, told = FakeEtcd(), Told()
        watch = watched(etcd, told)
        await watch.start()
        for number in range(5):
            await do(etcd, "other", number)
        await do(etcd, "progress", 0)
        await do(etcd, "let", 0)
        etcd.store.compact(etcd.store.revision)
        etcd.cut()
        await do(etcd, "put", 1)
        await settle(told, etcd)
        assert watch.num_listings == 1
        watch.close()
        await asyncio.gather(watch.task, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("with_listing", [False, True])
def test_another_cluster_at_the_same_address_is_listed(with_listing):
    async def main():
        etcd, told = FakeEtcd(), Told()
        watch = watched(etcd, told, Listing((), etcd.store.revision) if with_listing else None)
        await watch.start()
        etcd.store.put(f"{PREFIX}old", b"", 0, 0.0)
        etcd.changed()
        await settle(told, etcd)
        etcd.store = RegistryStore(first_revision=100)
        etcd.store.put(f"{PREFIX}new", b"", 0, 0.0)
        etcd.cluster_id = 2
        etcd.cut()
        async with asyncio.timeout(5):
            while f"{PREFIX}new" not in told.entries:
                await asyncio.sleep(0.001)
        assert f"{PREFIX}old" in told.entries  # its owner may come
        etcd.disturbed_s = 0.0
        await settle(told, etcd)
        assert told.deleted == [f"{PREFIX}old"]
        watch.close()
        await asyncio.gather(watch.task, return_exceptions=True)

    asyncio.run(main())


def test_a_handler_that_fails_ends_no_watch(capsys):
    async def main():
        etcd = FakeEtcd()
        seen = []

        def on_changes(changes):
            seen.extend(changes)
            raise KeyError("bug")

        watch = EtcdWatch(etcd, PREFIX, on_changes, None, lambda watch: None)
        await watch.start()
        for number in range(3):
            await do(etcd, "put", number)
            await do(etcd, "let", 0)
        assert len(seen) == 3
        watch.close()
        await asyncio.gather(watch.task, return_exceptions=True)

    asyncio.run(main())
    assert "handler_failed" in capsys.readouterr().out


def test_a_history_is_known_by_its_last_write_and_the_count_of_keys():
    known = KnownEntries()
    assert known.is_like(None, 0)
    first, last = Entry("/w/a", b"x", 3, 9, 7), Entry("/w/b", b"x", 10, 10)
    assert not known.is_like(first, 1)
    known.replace(Listing((first, last), 12))
    assert known.is_like(last, 2)
    assert not known.is_like(None, 0)
    assert not known.is_like(last, 3)
    assert not known.is_like(first, 2)
    assert not known.is_like(Entry("/w/b", b"x", 10, 10, 8), 2)


def test_ranges():
    assert range_end("/a/") == b"/a0"
    assert range_end("") == b"\0"
    assert list_request("").key == b"\0"
    assert range_end("\U0010ffff") == b"\xf4\x8f\xbf\xc0"


def test_a_listing_given_is_where_it_begins():
    async def main():
        etcd, told = FakeEtcd(), Told()
        watch = watched(etcd, told, Listing((), etcd.store.revision))
        await watch.start()
        await do(etcd, "put", 1)
        await settle(told, etcd)
        assert watch.num_listings == 0
        watch.close()
        await asyncio.gather(watch.task, return_exceptions=True)

    asyncio.run(main())
