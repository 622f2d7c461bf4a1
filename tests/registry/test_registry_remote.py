"""The embedded registry across losses: connections, history, the server itself."""

from __future__ import annotations

import asyncio

import pytest

from xllm.errors import BackpressureError, BrokenError, ConfigError, OverloadedError
from xllm.protocol.codec import Decoder
from xllm.protocol.registry import embedded, remote_watch
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.keeper import Registration
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.open import open_registry
from xllm.protocol.registry.remote import RemoteRegistry
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import (
    EntriesChanged,
    PingRegistry,
    RegistryRefused,
    RegistryReply,
)
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.security import Security, create_keys


@pytest.fixture
def transport():
    transport = Transport()
    yield transport
    transport.close()


def run(coroutine):
    async def main():
        async with asyncio.timeout(20):
            return await coroutine

    return asyncio.run(main())


async def wait_until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_no_registry_is_a_broken_error_in_time_and_shows_as_degraded(transport, tmp_path):
    async def main():
        registry = RemoteRegistry(transport, f"ipc://{tmp_path}/none", timeout_s=0.2)
        assert not registry.degraded
        with pytest.raises(BrokenError, match="cannot be reached"):
            await registry.get("/a")
        assert registry.degraded
        await registry.close()

    run(main())


def test_a_watch_survives_the_restart_of_the_registry(transport, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_watch, "RESTART_GRACE_S", 1.0)

    async def main():
        endpoint = f"ipc://{tmp_path}/registry"
        server = EmbeddedRegistryServer(transport, endpoint)
        registry = RemoteRegistry(transport, endpoint, timeout_s=0.5)
        seen = {}
        deletions = []

        def on_changes(changes):
            for change in changes:
                if change.entry is None:
                    deletions.append(change.key)
                    del seen[change.key]
                else:
                    seen[change.key] = change.entry.value

        first = await server.registry.put("/stays", b"1")
        await server.registry.put("/goes", b"1")
        await registry.watch("/", on_changes, patient=True)
        assert seen == {"/stays": b"1", "/goes": b"1"}
        await server.close()
        await wait_until(lambda: registry.degraded)
        assert deletions == []
        server = EmbeddedRegistryServer(transport, endpoint)
        assert await server.registry.put("/stays", b"2") > first
        await wait_until(lambda: seen["/stays"] == b"2")
        assert deletions == []
        await wait_until(lambda: deletions == ["/goes"])
        assert seen == {"/stays": b"2"}
        assert not registry.degraded
        await server.registry.put("/new", b"3")
        await wait_until(lambda: "/new" in seen)
        await registry.close()
        await server.close()

    run(main())


def test_a_watch_whose_history_was_cut_lists_anew(transport):
    async def main():
        store = RegistryStore(max_history=4)
        server = EmbeddedRegistryServer(transport, "inproc://cut", store=store)
        registry = RemoteRegistry(transport, "inproc://cut")
        seen = {}

        def on_changes(changes):
            for change in changes:
                if change.entry is None:
                    del seen[change.key]
                else:
                    seen[change.key] = change.entry.value

        await server.registry.put("/gone", b"")
        await registry.watch("/", on_changes)
        assert "/gone" in seen
        # In one go, so that the server cannot tell in between: the watch is lost.
        store.delete("/gone", 0.0)
        for number in range(50):
            store.put(f"/{number % 10}", str(number).encode(), 0, 0.0)
        server.registry.changed()
        await wait_until(lambda: len(seen) == 10)
        assert seen == {e.key: e.value for e in store.list("/", 0.0).entries}
        await server.registry.put("/after", b"")
        await wait_until(lambda: "/after" in seen)
        await registry.close()
        await server.close()

    run(main())


def test_a_watch_of_a_connection_that_takes_no_more_is_told_later(transport, monkeypatch):
    """Nothing but the news says that something changed: it must not be dropped."""
    monkeypatch.setattr(embedded, "_AGAIN_S", 0.01)

    async def main():
        server = EmbeddedRegistryServer(transport, "inproc://full")
        registry = RemoteRegistry(transport, "inproc://full")
        seen = []
        await registry.watch("/", lambda changes: seen.extend(one.key for one in changes))
        full = ["first", "second", "third"]
        take = server._socket.send

        def send(identity, message):
            if full and isinstance(message, EntriesChanged):
                full.pop()
                raise BackpressureError("20000 messages wait already")
            take(identity, message)

        monkeypatch.setattr(server._socket, "send", send)
        await server.registry.put("/a", b"1")
        await server.registry.put("/b", b"2")
        await wait_until(lambda: not full)
        await wait_until(lambda: seen)
        assert seen == ["/a", "/b"]
        await registry.close()
        await server.close()

    run(main())


def test_one_watch_too_many_is_refused_and_a_known_one_tries_again(
    transport, tmp_path, monkeypatch
):
    monkeypatch.setattr(embedded, "MAX_WATCHES", 1)
    monkeypatch.setattr(remote_watch, "_RETRY_S", 0.01)

    async def main():
        endpoint = f"ipc://{tmp_path}/registry"
        server = EmbeddedRegistryServer(transport, endpoint)
        registry = RemoteRegistry(transport, endpoint)
        seen = []
        watch = await registry.watch("/", lambda changes: seen.extend(one.key for one in changes))
        with pytest.raises(OverloadedError, match="1 watches are the most"):
            await registry.watch("/", lambda changes: None)
        await server.close()
        await wait_until(lambda: watch.task is not None)
        # No room at the restarted one at first: refused, and not given up.
        monkeypatch.setattr(embedded, "MAX_WATCHES", 0)
        refused = []
        monkeypatch.setattr(
            remote_watch._log, "warning", lambda event, **more: refused.append(event)
        )
        server = EmbeddedRegistryServer(transport, endpoint)
        await wait_until(lambda: len(refused) > 1)
        assert not watch.task.done()
        monkeypatch.setattr(embedded, "MAX_WATCHES", 1)
        await wait_until(watch.task.done)
        await server.registry.put("/new", b"")
        await wait_until(lambda: seen == ["/new"])
        await registry.close()
        await server.close()

    run(main())


def test_a_gone_connection_leaves_no_watch_behind(transport, tmp_path):
    async def main():
        endpoint = f"ipc://{tmp_path}/registry"
        server = EmbeddedRegistryServer(transport, endpoint)
        registry = RemoteRegistry(transport, endpoint)
        await registry.watch("/", lambda changes: None)
        assert len(server._watches) == 1
        await registry.close()
        await wait_until(lambda: not server._watches)
        await server.close()

    run(main())


def test_frames_that_do_not_decode_are_answered_and_harm_nobody(transport):
    async def main():
        server = EmbeddedRegistryServer(transport, "inproc://bad")
        answers = []
        dealer = DealerSocket(
            transport, "inproc://bad", Decoder(RegistryReply), lambda m, f: answers.append(m)
        )
        dealer._send(b"", (b"\xc1 nonsense",))
        dealer.send(PingRegistry(7))
        await wait_until(lambda: len(answers) == 2)
        assert isinstance(answers[0], RegistryRefused)
        assert (answers[0].id, answers[0].code) == (-1, "bad_message")
        assert answers[1].id == 7
        dealer.close()
        await server.close()

    run(main())


def test_a_registration_renews_and_comes_back_after_a_lost_lease():
    async def main():
        registry = LocalRegistry(RegistryStore())
        record = [b"one"]
        registration = Registration(registry, "/me", lambda: record[0], 2.0)
        assert await registration.attempt()
        first = registration.lease_id
        assert (await registry.get("/me")).value == b"one"
        record[0] = b"two"
        await registration.refresh()
        assert (await registry.get("/me")).value == b"two"
        await registry.revoke(first)
        assert await registry.get("/me") is None
        await wait_until(lambda: registration.num_registrations == 2)
        entry = await registry.get("/me")
        assert (entry.value, entry.lease_id) == (b"two", registration.lease_id)
        assert registration.lease_id != first
        assert not registration.degraded
        await registration.withdraw()
        assert await registry.get("/me") is None
        await registration.withdraw()
        await registry.close()

    run(main())


def test_a_registration_fails_static_and_returns_with_the_registry(transport, tmp_path):
    async def main():
        endpoint = f"ipc://{tmp_path}/registry"
        server = EmbeddedRegistryServer(transport, endpoint)
        registry = RemoteRegistry(transport, endpoint, timeout_s=0.2)
        registration = Registration(registry, "/me", lambda: b"x", 2.0)
        assert await registration.attempt()
        await server.close()
        await wait_until(lambda: registration.degraded)
        server = EmbeddedRegistryServer(transport, endpoint)
        await wait_until(lambda: not registration.degraded)
        assert (await server.registry.get("/me")).value == b"x"
        assert registration.num_registrations == 2
        await server.close()
        await registration.withdraw()
        await registry.close()

    run(main())


def test_a_refresh_that_is_not_answered_is_made_up_for(transport, tmp_path):
    async def main():
        endpoint = f"ipc://{tmp_path}/registry"
        store = RegistryStore()
        server = EmbeddedRegistryServer(transport, endpoint, store=store)
        registry = RemoteRegistry(transport, endpoint, timeout_s=0.2)
        record = [b"one"]
        registration = Registration(registry, "/me", lambda: record[0], 2.0)
        assert await registration.attempt()
        await server.close()
        record[0] = b"two"
        await registration.refresh()
        assert store.get("/me", 0.0).value == b"one"
        # The same entries and leases again, as a durable registry has them after a restart.
        server = EmbeddedRegistryServer(transport, endpoint, store=store)
        await wait_until(lambda: store.get("/me", 0.0).value == b"two")
        assert registration.num_registrations == 1
        await registration.withdraw()
        await registry.close()
        await server.close()

    run(main())


@pytest.mark.parametrize(
    "address",
    [
        *("", "ipc", "http://localhost", "tcp://127.0.0.1:1;key=short"),
        *("etcd://127.0.0.1", "etcd://127.0.0.1:2379;key=short"),
    ],
)
def test_addresses_that_cannot_be_opened(transport, address):
    async def main():
        with pytest.raises(ConfigError, match=r"cluster\.registry"):
            open_registry(address, transport)

    run(main())


@pytest.mark.parametrize("key", ["", f";key={'a' * 40}"])
def test_another_machine_without_keys_is_a_matter_of_configuration(transport, key):
    async def main():
        with pytest.raises(ConfigError, match=r"cluster\.keys_dir.*;key=PUBLIC_KEY"):
            open_registry(f"tcp://10.1.2.3:1{key}", transport)

    run(main())


def test_keys_matter_on_tcp_alone(tmp_path):
    keys = str(tmp_path / "keys")
    create_keys(keys)

    async def main():
        transport = Transport(Security.load(keys))
        for endpoint in (f"ipc://{tmp_path}/r", "inproc://r", "tcp://127.0.0.1:0"):
            server = EmbeddedRegistryServer(transport, endpoint)
            key = transport.security.public_key
            registry = open_registry(f"{server.endpoint};key={key}", transport)
            assert await registry.put("/a", b"") > 0
            await registry.close()
            await server.close()
        transport.close()

    run(main())
