"""The line of those who wait, in a router's service over fakes."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.router.admission_cluster import BUSY, IDLE, ask, close, cluster_with, metrics, sent_to
from tests.router.fake_cluster import ListSink, in_loop
from xllm.protocol.bus import InstanceLoad
from xllm.protocol.generation import (
    LIFE_ATTEMPTS,
    ChatMessage,
    RequestFinished,
    ResumePoint,
    SubmitRequest,
)
from xllm.router.effort import LONG_TALK_MESSAGES
from xllm.router.front import Tenant
from xllm.router.submission import bound_id


@in_loop
async def test_requests_wait_while_all_instances_are_saturated():
    cluster = cluster_with("a", "b", instance_waiting=8)
    for name in "ab":
        cluster.beat(name, load=BUSY)
    asked = [ask(cluster) for _ in range(3)]
    assert not cluster.links.admits()
    assert cluster.service.admission.num_waiting == 3
    own = cluster.service.status().processes[0]
    assert (own.num_waiting, own.num_running) == (3, 0)
    assert "xllm_router_queue_length" in metrics(cluster)
    cluster.beat("b", load=IDLE)
    cluster.tick()
    assert sent_to(cluster) == ["b"] * 3
    for request_id, sink in asked:
        cluster.say(request_id, 0, "a", "length")
        cluster.end(request_id)
        assert isinstance(sink.last, RequestFinished)
    assert cluster.service.admission.num_waiting == 0
    close(cluster)


@in_loop
async def test_a_request_that_ends_makes_room_at_once():
    cluster = cluster_with("a", instance_waiting=2)
    cluster.beat("a", load=InstanceLoad(num_running=1, num_waiting=1))
    first, _ = ask(cluster)
    waiting = [ask(cluster) for _ in range(2)]
    assert len(cluster.links.admits()) == 1
    cluster.say(first, 0, "a", "length")
    cluster.end(first)
    assert [word.request_id for word in cluster.links.admits()] == [first, waiting[0][0]]
    close(cluster)


@in_loop
async def test_nothing_waits_where_it_is_turned_off():
    cluster = cluster_with("a", instance_waiting=0)
    cluster.beat("a", load=InstanceLoad(num_running=1, num_waiting=500))
    ask(cluster)
    assert len(cluster.links.admits()) == 1
    close(cluster)


@in_loop
async def test_whoever_waits_too_long_learns_when_to_come_back():
    cluster = cluster_with("a", instance_waiting=1, queue_timeout_s=5)
    cluster.beat("a", load=BUSY)
    _, urgent = ask(cluster, ttft_ms=1000)
    _, patient = ask(cluster)
    _, offline = ask(cluster, offline=True)
    for _ in range(12):
        cluster.clock.now += 0.1
        cluster.beat("a", load=BUSY)
        cluster.tick()
    assert (urgent.last.code, urgent.last.retry_after_ms > 0) == ("overloaded", True)
    assert not patient.messages
    for _ in range(40):
        cluster.clock.now += 0.1
        cluster.beat("a", load=BUSY)
        cluster.tick()
    assert patient.last.code == "overloaded"
    assert not offline.messages  # best effort has all its time
    assert 'xllm_router_rejections_total{reason="timeout",tenant="t"' in metrics(cluster)
    close(cluster)


@in_loop
async def test_who_waits_for_an_instance_that_is_gone_hears_that():
    cluster = cluster_with("a", instance_waiting=1, queue_timeout_s=3)
    cluster.beat("a", load=BUSY)
    _, sink = ask(cluster)
    cluster.change(cluster.service.view.disconnected("a"))
    for _ in range(31):
        cluster.tick()
        cluster.clock.now += 0.1
    assert (sink.last.code, sink.last.retry_after_ms) == ("unavailable", 1000)
    close(cluster)


@in_loop
async def test_an_abort_and_a_deadline_end_who_waits():
    cluster = cluster_with("a", instance_waiting=1)
    cluster.beat("a", load=BUSY)
    request_id, aborted = ask(cluster)
    _, late = ask(cluster, timeout_ms=500)
    cluster.service.abort(request_id)
    assert aborted.last.code == "aborted"
    assert cluster.service.admission.num_waiting == 1
    for _ in range(6):
        cluster.clock.now += 0.1
        cluster.beat("a", load=BUSY)
        cluster.tick()
    assert late.last.code in ("deadline_exceeded", "overloaded")
    assert cluster.service.admission.num_waiting == 0
    assert cluster.service.num_open == 0
    close(cluster)


@in_loop
async def test_a_full_line_sheds_offline_first_and_says_so_quickly():
    cluster = cluster_with("a", instance_waiting=1, queue_size=3)
    cluster.beat("a", load=BUSY)
    _, offline = ask(cluster, offline=True)
    _, low = ask(cluster, priority=-1)
    _, plain = ask(cluster)
    began = time.perf_counter()
    _, urgent = ask(cluster, priority=1)
    ask(cluster)
    _, refused = ask(cluster, priority=-2)
    assert time.perf_counter() - began < 0.5
    assert (offline.last.code, low.last.code) == ("overloaded", "overloaded")
    assert refused.last.code == "overloaded"
    assert "requests wait for an instance" in refused.last.message
    assert not plain.messages
    assert not urgent.messages
    text = metrics(cluster)
    assert 'reason="shed",tenant="t"' in text
    assert 'reason="queue",tenant="t"' in text
    close(cluster)


@in_loop
@pytest.mark.parametrize("size", [0, 1])
async def test_a_long_prompt_is_refused_before_the_work_on_it(size):
    cluster = cluster_with("a", instance_waiting=1, queue_size=size)
    cluster.beat("a", load=BUSY)
    if size:
        ask(cluster)
    encoded = []
    cluster.service._pool.run = lambda tenant, job: encoded.append(tenant)
    talk = tuple([ChatMessage("user", "a")] * (LONG_TALK_MESSAGES + 1))
    sink = ListSink()
    cluster.service.submit(SubmitRequest(id=1, messages=talk), Tenant("t"), sink)
    assert (sink.last.code, sink.last.retry_after_ms > 0) == ("overloaded", True)
    assert not encoded
    assert 'reason="queue",tenant="t"' in metrics(cluster)
    close(cluster)


@in_loop
async def test_a_key_that_waits_in_the_line_goes_to_the_highest_life():
    cluster = cluster_with("a", "b")
    key = "0123456789abcdef" * 2

    def come_back(attempt: int) -> ListSink:
        sink = ListSink()
        point = ResumePoint(attempt=attempt, outputs=((),), seed=1)
        request = SubmitRequest(id=1, prompt="hello", key=key, resume=point)
        cluster.service.submit(request, Tenant("t"), sink)
        return sink

    first = come_back(LIFE_ATTEMPTS)
    for attempt in (2 * LIFE_ATTEMPTS, 2 * LIFE_ATTEMPTS + 1):
        cluster.end(bound_id(key, Tenant("t")), attempt, code="overloaded")
    assert cluster.service.admission.num_waiting == 1
    assert come_back(1).last.code == "conflict"
    assert come_back(LIFE_ATTEMPTS).last.code == "conflict"
    assert not first.messages
    higher = come_back(2 * LIFE_ATTEMPTS)
    assert first.last.code == "aborted"
    assert not higher.messages
    close(cluster)


@in_loop
async def test_a_flood_of_one_tenant_does_not_hold_up_another():
    cluster = cluster_with("a", instance_waiting=1)
    cluster.beat("a", load=InstanceLoad(num_running=1))
    running, _ = ask(cluster, "flood")
    cluster.beat("a", load=BUSY)
    for _ in range(50):
        ask(cluster, "flood")
    small, _ = ask(cluster, "small")
    cluster.beat("a", load=InstanceLoad(num_running=1))
    for _ in range(3):
        cluster.tick()
        newest = cluster.links.admits()[-1].request_id
        cluster.say(newest, 0, "a", "length")
        cluster.end(newest)
    first = [word.request_id for word in cluster.links.admits()][:3]
    assert first[0] == running
    assert small in first
    close(cluster)


@in_loop
async def test_a_request_that_all_instances_refuse_waits_for_room():
    cluster = cluster_with("a", "b")
    request_id, sink = ask(cluster)
    for attempt in (1, 2):
        cluster.end(request_id, attempt, code="overloaded")
    assert [word.attempt for word in cluster.links.admits()] == [1, 2]
    assert cluster.service.admission.num_waiting == 1
    cluster.tick()
    assert len(cluster.links.admits()) == 2  # both are still full
    cluster.beat("b")
    cluster.tick()
    assert cluster.links.admits()[-1].attempt == 3
    assert cluster.links.sent[-1][0] == "b"
    cluster.say(request_id, 0, "a", "length", 3)
    cluster.end(request_id, 3)
    assert isinstance(sink.last, RequestFinished)
    close(cluster)


@in_loop
async def test_instances_that_take_nothing_are_asked_again():
    cluster = cluster_with("a", "b", queue_timeout_s=2)
    cluster.links.unreachable |= {"a", "b"}
    _, sink = ask(cluster)
    for _ in range(30):
        await asyncio.sleep(0)
    assert cluster.service.admission.num_waiting == 1
    cluster.links.unreachable.clear()
    cluster.beat("a")
    cluster.tick()
    assert sent_to(cluster) == ["a"]
    assert not sink.messages
    close(cluster)
