"""Roles of instances, as long as every request runs whole at one of them."""

from __future__ import annotations

import pytest

from tests.router.fake_cluster import FakeCluster, in_loop
from xllm.config.admission import AdmissionSettings
from xllm.config.router import RouterSettings
from xllm.config.routing import RoutingSettings
from xllm.protocol.bus import InstanceLoad


def places(cluster: FakeCluster, count: int = 6, **fields) -> set[str]:
    """Where so many requests go."""
    ids = {cluster.ask(**fields)[0] for _ in range(count)}
    admits = {word.request_id for word in cluster.links.admits()}
    assert ids <= admits
    return {name for name, word in cluster.links.sent if word.request_id in ids}


@in_loop
@pytest.mark.parametrize(
    "policy", ["prefix-aware", "least-load", "kv-load", "round-robin", "random"]
)
@pytest.mark.parametrize("session", ["", "s", "t", "u"])
async def test_whole_requests_go_to_instances_for_all(policy, session):
    cluster = FakeCluster("a", "b", "c", policy=policy, routing=RoutingSettings(guard_requests=99))
    cluster.beat("a", role="prefill")
    cluster.beat("c", role="decode")
    assert places(cluster, session=session) == {"b"}
    cluster.beat("a", role="both")
    cluster.beat("b", role="decode")
    assert places(cluster, session=session) == {"a"}
    cluster.close()


@in_loop
async def test_where_none_is_for_all_everybody_serves():
    cluster = FakeCluster("a", "b")
    cluster.beat("a", role="prefill")
    cluster.beat("b", role="decode")
    assert places(cluster) == {"a", "b"}
    cluster.close()


@in_loop
async def test_room_is_that_of_instances_for_all():
    settings = AdmissionSettings(instance_waiting=1)
    cluster = FakeCluster("a", "b", admission=settings)
    cluster.beat("a", role="prefill")
    cluster.beat("b", load=InstanceLoad(num_running=4, num_waiting=8))
    cluster.ask()
    assert cluster.service.admission.num_waiting == 1
    cluster.beat("a", role="both")
    cluster.tick()
    assert [name for name, _ in cluster.links.sent] == ["a"]
    cluster.close()


@in_loop
async def test_who_loses_its_instance_may_go_to_another_role():
    cluster = FakeCluster("a", "b")
    cluster.beat("b", role="decode")
    request_id, sink = cluster.ask(max_tokens=3)
    cluster.change(cluster.service.view.disconnected("a"))
    [first, second] = cluster.links.admits()
    assert (first.stages[0][1], second.stages[0][1]) == ("a", "b")
    cluster.say(request_id, 0, "abc", "length", 2)
    cluster.end(request_id, 2)
    assert sink.text == "abc"
    cluster.close()


def test_the_default_policy_is_among_those_above():
    assert RouterSettings().policy == "prefix-aware"
