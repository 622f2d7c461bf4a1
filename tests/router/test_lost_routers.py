"""Requests that were lost with another router: how this one admits them."""

from __future__ import annotations

import pytest

from tests.router.admission_cluster import BUSY, ask, close, cluster_with, sent_to
from tests.router.fake_cluster import in_loop
from xllm.protocol.bus import RouterPresence, TenantUse
from xllm.protocol.generation import LIFE_ATTEMPTS, ResumePoint


def again(outputs: tuple[int, ...] = ()) -> ResumePoint:
    return ResumePoint(attempt=1, outputs=(outputs,), seed=1)


@in_loop
async def test_a_request_that_another_router_lost_waits_for_nobody():
    cluster = cluster_with("a", instance_waiting=1, queue_size=1)
    cluster.beat("a", load=BUSY)
    _, waiting = ask(cluster)
    ask(cluster, resume=again((5, 6)))
    ask(cluster, resume=again())
    assert [word.attempt for word in cluster.links.admits()] == [LIFE_ATTEMPTS] * 2
    assert not waiting.messages
    _, refused = ask(cluster)
    assert refused.last.code == "overloaded"
    close(cluster)


@in_loop
@pytest.mark.parametrize("outputs", [(), (5, 6)])
async def test_it_waits_for_an_instance_where_there_is_none(outputs):
    cluster = cluster_with("a")
    cluster.change(cluster.service.view.disconnected("a"))
    _, new = ask(cluster)
    assert new.last.code == "unavailable"
    _, sink = ask(cluster, resume=again(outputs))
    cluster.clock.now += 1
    cluster.tick()
    assert not sink.messages
    cluster.change(cluster.service.view.connected("a"))
    cluster.beat("a")
    assert [word.outputs for word in cluster.links.admits()] == [(outputs,) if outputs else ()]
    close(cluster)


@in_loop
async def test_it_is_not_refused_for_what_it_used_there():
    cluster = cluster_with("a", concurrency=2, requests_per_minute=2)
    cluster.service.heard(RouterPresence("r2", "1", 1, tenants=(TenantUse("t", 2, 2, 0),)))
    _, refused = ask(cluster)
    assert refused.last.code == "rate_limit_exceeded"
    for _ in range(2):
        _, sink = ask(cluster, resume=again((5,)))
        assert not sink.messages
    _, beyond = ask(cluster, resume=again())
    assert beyond.last.code == "rate_limit_exceeded"
    close(cluster)


@in_loop
async def test_tokens_that_it_brought_along_are_not_charged_again():
    cluster = cluster_with("a", tokens_per_minute=1000)
    request_id, _ = ask(cluster, resume=again((5, 6, 7)))
    cluster.say(request_id, 3, "a", attempt=LIFE_ATTEMPTS)
    [prompt] = cluster.service.admission.word()
    cluster.service.abort(request_id)
    [after] = cluster.service.admission.word()
    assert prompt.num_tokens > 0
    assert after.num_tokens == 1
    close(cluster)


@in_loop
async def test_one_that_ran_and_was_lost_begins_to_wait_then():
    cluster = cluster_with("a", "b", queue_timeout_s=2)
    request_id, sink = ask(cluster)
    [first] = sent_to(cluster)
    other = "ab".replace(first, "")
    cluster.clock.now += 10
    for name in "ab":
        cluster.beat(name)
    cluster.change(cluster.service.view.disconnected(first))
    assert [word.stages[0][1] for word in cluster.links.admits()] == [first, other]
    cluster.end(request_id, 2, code="overloaded")
    for _ in range(15):
        cluster.clock.now += 0.1
        cluster.tick()
    assert cluster.service.admission.num_waiting == 1
    assert not sink.messages
    close(cluster)
