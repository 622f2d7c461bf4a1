"""Whose cached prefixes are whose: by key, and all one where the operator says so."""

from __future__ import annotations

import pytest

from tests.router.fake_cluster import FakeCluster, ListSink, in_loop
from xllm.protocol.authority import CLIENT_ROLES, KnownPeer
from xllm.protocol.generation import RequestFailed, SubmitRequest
from xllm.router.front import Tenant, tenant_of

PROMPT = tuple(range(1, 41))


def peer(name, key):
    return KnownPeer(name, key * 40, CLIENT_ROLES)


TENANTS = [
    Tenant("http", b"s" * 32),
    Tenant("http-too", b"t" * 32),
    tenant_of(b"1", peer("app", "a")),
    tenant_of(b"2", peer("app", "b")),
    tenant_of(b"3", None),
]


def hashes(cluster, salt):
    for tenant in TENANTS:
        request = SubmitRequest(id=1, prompt=PROMPT, cache_salt=salt)
        cluster.service.submit(request, tenant, ListSink())
    return [admit.block_hashes for admit in cluster.links.admits()]


@pytest.mark.parametrize("salt", ["", "x"])
@pytest.mark.parametrize("single", [False, True])
def test_tenants_share_blocks_only_where_they_are_one(single, salt):
    @in_loop
    async def scenario():
        cluster = FakeCluster("a", single_tenant=single)
        found = hashes(cluster, salt)
        assert len(found) == len(TENANTS)
        assert len(set(found)) == (1 if single else len(TENANTS))
        blocks = [{one[i : i + 32] for i in range(0, len(one), 32)} for one in found]
        assert all(len(one) == len(PROMPT) // 4 for one in blocks)
        assert bool(blocks[0] & blocks[1]) is single
        cluster.close()

    scenario()


def test_a_connection_s_key_is_its_tenant_and_not_its_name():
    again = tenant_of(b"other", peer("app", "a"))
    assert again == TENANTS[2]
    assert TENANTS[2].name == TENANTS[3].name == "app"
    assert TENANTS[2].salt != TENANTS[3].salt
    # Without keys all share, and none has limits of its own.
    assert tenant_of(b"4", None).salt == TENANTS[4].salt == b""
    assert tenant_of(b"4", None).account == TENANTS[4].account == Tenant().name


@pytest.mark.parametrize("salt", ["x" * 129, "a b", "a\n", "ä", "\x00", "../../x;"])
def test_salts_of_clients_are_bounded(salt):
    @in_loop
    async def scenario():
        cluster = FakeCluster("a")
        sink = ListSink()
        cluster.service.submit(SubmitRequest(id=1, prompt=PROMPT, cache_salt=salt), Tenant(), sink)
        [answer] = sink.messages
        assert isinstance(answer, RequestFailed)
        assert (answer.code, answer.param) == ("invalid_value", "cache_salt")
        cluster.close()

    scenario()
