"""A registry that is late, and renewals that fail in ways nobody thought of."""

from __future__ import annotations

import asyncio
import time

import pytest
import structlog

from xllm.config.cluster import ClusterSettings
from xllm.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    DependencyError,
    InvalidRequestError,
    PermissionDeniedError,
    XllmError,
)
from xllm.protocol.registry import keeper, waiting
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.keeper import Registration, register
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.remote import RemoteRegistry
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry.waiting import wait_registry
from xllm.protocol.transport.context import Transport


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


@pytest.fixture
def cluster(run_dir, monkeypatch):
    monkeypatch.setattr(waiting, "_AGAIN_S", 0.01)
    return ClusterSettings(registry=f"ipc://{run_dir}/registry", registry_wait_s=10.0)


def test_a_registry_that_starts_late_is_waited_for(cluster, capsys):
    async def main():
        transport = Transport()
        registry = RemoteRegistry(transport, cluster.registry, timeout_s=0.05)
        registration = Registration(registry, "/me", lambda: b"x", 2.0)
        waits = asyncio.create_task(register(cluster, registration))
        while "registry_awaited" not in capsys.readouterr().out:
            await asyncio.sleep(0.01)
        server = EmbeddedRegistryServer(transport, cluster.registry)
        await waits
        assert (await server.registry.get("/me")).value == b"x"
        await registration.withdraw()
        await registry.close()
        await server.close()
        transport.close()

    run(main())


@pytest.mark.parametrize(("say_s", "num_lines"), [(60.0, 1), (0.0, 5)])
def test_the_log_tells_when_waiting_begins_and_ends(cluster, monkeypatch, say_s, num_lines):
    monkeypatch.setattr(waiting, "SAY_S", say_s)
    errors = [BrokenError("silent")] * 5

    async def call():
        if errors:
            raise errors.pop()
        return "here"

    with structlog.testing.capture_logs() as logs:
        assert run(wait_registry(cluster, call)) == "here"
    names = [line["event"] for line in logs]
    assert names == ["registry_awaited"] * num_lines + ["registry_answers"]
    with structlog.testing.capture_logs() as logs:
        assert run(wait_registry(cluster, call)) == "here"
    assert logs == []


def test_one_that_never_comes_is_missing_in_time(run_dir):
    cluster = ClusterSettings(registry=f"ipc://{run_dir}/none;key=k", registry_wait_s=0.1)

    async def main():
        transport = Transport()
        registry = RemoteRegistry(transport, f"ipc://{run_dir}/none", timeout_s=8.0)
        began = time.monotonic()
        with pytest.raises(DependencyError, match=rf"ipc://{run_dir}/none did not answer in 0.1"):
            await wait_registry(cluster, lambda: registry.get("/a"))
        assert time.monotonic() - began < 3
        await registry.close()
        transport.close()

    run(main())


@pytest.mark.parametrize("error", [ClosedError("over"), InvalidRequestError("no key")])
def test_what_waiting_does_not_help_is_raised_at_once(cluster, error):
    async def call():
        raise error

    async def main():
        with pytest.raises(type(error)):
            await wait_registry(cluster, call)

    run(main())


def test_who_is_refused_need_not_wait(cluster):
    async def call():
        raise PermissionDeniedError("not yours", param="etcd.user_file")

    with pytest.raises(ConfigError, match="not yours"):
        run(wait_registry(cluster, call))


class MoodyRegistry(LocalRegistry):
    """Fails renewals with what is in `errors`, one after the other."""

    def __init__(self, clock):
        super().__init__(RegistryStore(), clock)
        self.errors = []
        self.num_asked = 0
        self.num_gets = 0

    async def get(self, key):
        self.num_gets += 1
        return await super().get(key)

    async def keep_alive(self, lease_id):
        self.num_asked += 1
        if self.errors:
            raise self.errors.pop()
        return await super().keep_alive(lease_id)


def test_no_failure_of_a_renewal_ends_the_renewals(monkeypatch):
    monkeypatch.setattr(keeper, "_MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(keeper, "_MAX_PAUSE_S", 0.01)

    async def main():
        registry = MoodyRegistry(time.monotonic)
        registration = Registration(registry, "/me", lambda: b"x", 2.0)
        assert await registration.attempt()
        registration._expires_at = 0.0  # due at once
        registry.errors = [
            BrokenError("silent"), InvalidRequestError("odd"), XllmError("odder"), KeyError("bug"),
        ]  # fmt: skip
        while registry.errors:
            await asyncio.sleep(0.01)
            assert not registration._task.done()
        while registration.degraded:
            await asyncio.sleep(0.01)
        assert (await registry.get("/me")).value == b"x"
        await registration.withdraw()
        await registry.close()

    run(main())


def test_after_an_outage_owners_do_not_come_back_all_at_once(monkeypatch):
    monkeypatch.setattr(keeper, "_MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(keeper, "_MAX_PAUSE_S", 0.01)
    spreads = []

    def spread():
        spreads.append(0.01)
        return spreads[-1]

    async def main():
        registry = MoodyRegistry(time.monotonic)
        registration = Registration(registry, "/me", lambda: b"x", 2.0, spread=spread)
        assert await registration.attempt()
        await registry.revoke(registration.lease_id)
        registration._expires_at = 0.0  # due at once
        while registration.num_registrations < 2:
            await asyncio.sleep(0.01)
        assert spreads == []  # there was no outage: at once
        registry.errors = [BrokenError("silent")] * 3
        await registry.revoke(registration.lease_id)
        while registration.num_registrations < 3:
            await asyncio.sleep(0.01)
        assert spreads == [0.01]
        await registration.withdraw()
        await registry.close()

    run(main())


def test_a_key_that_went_while_its_lease_stands_is_put_again(monkeypatch):
    monkeypatch.setattr(keeper, "_RENEWAL_S", 0.01)
    monkeypatch.setattr(keeper, "_MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(keeper, "_LOOK_S", 0.01)

    async def main():
        registry = MoodyRegistry(time.monotonic)
        registration = Registration(registry, "/me", lambda: b"x", 120.0)
        assert await registration.attempt()
        # A write of an earlier try comes late, under a lease that nobody keeps.
        late = await registry.grant(120.0)
        await registry.put("/me", b"x", late.id)
        await registry.revoke(late.id)
        assert await registry.get("/me") is None
        while await registry.get("/me") is None:
            await asyncio.sleep(0.01)
        assert (await registry.get("/me")).lease_id == registration.lease_id
        assert registration.num_registrations == 1
        await registration.withdraw()
        assert await registry.get("/me") is None
        await registry.close()

    run(main())


def test_long_leases_are_renewed_often_enough_to_miss_them_soon(monkeypatch):
    monkeypatch.setattr(keeper, "_RENEWAL_S", 0.01)
    monkeypatch.setattr(keeper, "_MIN_PAUSE_S", 0.01)

    async def main():
        registry = MoodyRegistry(time.monotonic)
        registration = Registration(registry, "/me", lambda: b"x", 120.0)
        assert await registration.attempt()
        await registry.revoke(registration.lease_id)
        while registration.num_registrations < 2:
            await asyncio.sleep(0.01)
        assert (await registry.get("/me")).lease_id == registration.lease_id
        await registration.withdraw()
        await registry.close()

    run(main())
