"""Limits, the line of those who wait, and breakers, in a router's service over fakes."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.router.fake_cluster import FakeCluster, ListSink, in_loop
from xllm.config.admission import AdmissionSettings
from xllm.errors import ModelNotFoundError, RateLimitError
from xllm.protocol.bus import InstanceLoad, RouterPresence, TenantUse
from xllm.protocol.client import (
    LIFE_ATTEMPTS,
    ChatMessage,
    DetokenizeIds,
    RequestFinished,
    ResumePoint,
    SubmitRequest,
    TokenizeText,
)
from xllm.protocol.sampling import SamplingParams
from xllm.router.effort import LONG_TALK_MESSAGES
from xllm.router.front import Tenant
from xllm.router.submission import bound_id

BUSY = InstanceLoad(num_running=4, num_waiting=8)
IDLE = InstanceLoad(num_running=1)


def cluster_with(*names: str, **settings) -> FakeCluster:
    return FakeCluster(*names, admission=AdmissionSettings(**settings))


def ask(cluster: FakeCluster, tenant: str = "t", **more) -> tuple[str, ListSink]:
    sink = ListSink()
    request = SubmitRequest(id=1, prompt="hello", sampling=SamplingParams(max_tokens=5), **more)
    return cluster.service.submit(request, Tenant(tenant), sink), sink


def sent_to(cluster: FakeCluster) -> list[str]:
    admits = {word.request_id for word in cluster.links.admits()}
    return [name for name, word in cluster.links.sent if word.request_id in admits]


def metrics(cluster: FakeCluster) -> str:
    return cluster.service.metrics_text().decode()


def close(cluster: FakeCluster) -> None:
    cluster.service.admission.check()
    cluster.close()


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


# -- limits of tenants ------------------------------------------------------------------------


@in_loop
async def test_limits_hold_for_each_tenant_and_say_when_to_come_back(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text("[small]\nconcurrency = 1\n[slow]\nrequests_per_minute = 2\n")
    cluster = cluster_with("a", tenant_limits_file=str(path))
    for _ in range(30):
        ask(cluster, "free")
    open_one, _ = ask(cluster, "small")
    _, refused = ask(cluster, "small")
    assert (refused.last.code, refused.last.retry_after_ms >= 100) == ("rate_limit_exceeded", True)
    cluster.say(open_one, 0, "a", "length")
    cluster.end(open_one)
    _, again = ask(cluster, "small")
    assert not again.messages
    ask(cluster, "slow")
    ask(cluster, "slow")
    _, refused = ask(cluster, "slow")
    assert refused.last.retry_after_ms == pytest.approx(30_000, abs=10)
    assert 'reason="limit",tenant="slow"' in metrics(cluster)
    close(cluster)


@in_loop
async def test_tokens_are_limited_and_a_refused_request_is_not_counted_as_open():
    cluster = cluster_with("a", tokens_per_minute=60, concurrency=2)
    _, too_long = ask(cluster)
    request = SubmitRequest(id=1, prompt=tuple([5] * 61), sampling=SamplingParams(max_tokens=1))
    for _ in range(3):
        sink = ListSink()
        cluster.service.submit(request, Tenant("t"), sink)
        assert (sink.last.code, sink.last.param) == ("invalid_value", "prompt")
    assert not too_long.messages
    spent = SubmitRequest(id=1, prompt=tuple([5] * 60), sampling=SamplingParams(max_tokens=1))
    sink = ListSink()
    cluster.service.submit(spent, Tenant("t"), sink)
    assert sink.last.code == "rate_limit_exceeded"
    assert sink.last.retry_after_ms > 500
    _, second = ask(cluster)
    assert not second.messages
    close(cluster)


@in_loop
async def test_connections_without_a_name_share_their_limits():
    cluster = cluster_with("a", concurrency=1)
    for number, name in enumerate(("zmq-1", "zmq-2")):
        sink = ListSink()
        request = SubmitRequest(id=1, prompt="hello", sampling=SamplingParams(max_tokens=5))
        cluster.service.submit(request, Tenant(name, account="default"), sink)
        assert bool(sink.messages) == bool(number)
    close(cluster)


@in_loop
async def test_work_on_texts_and_ids_counts_as_requests():
    cluster = cluster_with("a", requests_per_minute=3, concurrency=1)
    tenant, other = Tenant("t"), Tenant("u")
    text, ids = TokenizeText(id=1, text="hello"), DetokenizeIds(id=1, token_ids=(5,))
    with pytest.raises(ModelNotFoundError):
        await cluster.service.tokenize(TokenizeText(id=1, model="no", text="x"), tenant)
    request_id, sink = ask(cluster)
    assert not sink.messages, "nothing is open any more"
    with pytest.raises(RateLimitError, match="open"):
        await cluster.service.tokenize(text, tenant)
    with pytest.raises(RateLimitError, match="open"):
        await cluster.service.detokenize(ids, tenant)
    cluster.service.abort(request_id)
    long = TokenizeText(id=1, text="hello " * 900)
    asked = asyncio.ensure_future(cluster.service.tokenize(long, tenant))
    await asyncio.sleep(0)
    _, refused = ask(cluster)
    assert refused.last.code == "rate_limit_exceeded", "it is open as long as a thread works on it"
    assert (await asked).token_ids
    with pytest.raises(RateLimitError, match="3 requests a minute"):
        await cluster.service.detokenize(ids, tenant)
    assert (await cluster.service.texts.encode(text, tenant)).token_ids, "part of a request"
    assert (await cluster.service.texts.decode(ids, tenant)).text
    assert (await cluster.service.tokenize(text, other)).token_ids
    [use] = [one for one in cluster.service.admission.word() if one.tenant == "t"]
    assert (use.num_open, use.num_requests) == (0, 3)
    close(cluster)


@in_loop
async def test_what_was_drawn_is_charged_however_a_request_ends():
    cluster = cluster_with("a", tokens_per_minute=60)
    request_id, sink = ask(cluster)
    cluster.say(request_id, 0, "x" * 70)
    cluster.service.abort(request_id)
    assert sink.last.code == "aborted"
    [use] = cluster.service.admission.word()
    assert (use.tenant, use.num_open, use.num_requests) == ("t", 0, 1)
    assert 70 < use.num_tokens < 80, "the prompt, and what was drawn"
    _, refused = ask(cluster)
    assert refused.last.code == "rate_limit_exceeded"
    assert refused.last.retry_after_ms > 10_000
    close(cluster)


@in_loop
async def test_a_limit_is_the_clusters():
    cluster = cluster_with("a", concurrency=2)
    word = RouterPresence("r2", "1", 7, tenants=(TenantUse("t", 1),))
    cluster.service.heard(word)
    ask(cluster)
    _, refused = ask(cluster)
    assert refused.last.code == "rate_limit_exceeded"
    assert cluster.service.admission.word() == (TenantUse("t", 1, 1, 0),)
    cluster.service.heard(RouterPresence("r2", "1", 6))  # a word of the past
    _, refused = ask(cluster)
    assert refused.last.code == "rate_limit_exceeded"
    cluster.service.heard(RouterPresence("r2", "1", 8))
    _, second = ask(cluster)
    assert not second.messages
    close(cluster)


# -- requests that were lost with another router ----------------------------------------------


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


# -- breakers ---------------------------------------------------------------------------------


@in_loop
async def test_an_instance_that_fails_requests_is_left_alone_and_tried_again():
    cluster = cluster_with("a", "b", breaker_failures=2, breaker_open_s=5)

    def fail_at(name: str) -> None:
        while True:
            request_id, sink = ask(cluster)
            where = cluster.links.sent[-1][0]
            if where == name:
                cluster.end(request_id, code="engine_error")
                assert sink.last.code == "engine_error"
                return
            cluster.say(request_id, 0, "a", "length")
            cluster.end(request_id)

    for _ in range(2):
        fail_at("a")
        cluster.clock.now += 0.5
    found = {one.name: one.breaker for one in cluster.service.status().processes}
    assert found["a"] == "open"
    assert found["b"] == ""
    assert 'xllm_router_breaker_state{target="a"' in metrics(cluster)
    cluster.links.sent.clear()
    for _ in range(6):
        ask(cluster)
    assert set(sent_to(cluster)) == {"b"}
    cluster.clock.now += 5
    for name in "ab":
        cluster.beat(name)
    asked = [ask(cluster)[0] for _ in range(4)]
    by_place = dict(zip(sent_to(cluster)[-4:], asked, strict=True))
    assert sent_to(cluster)[-4:].count("a") == 1  # the trial
    cluster.say(by_place["a"], 0, "a", "length")
    cluster.end(by_place["a"])
    found = {one.name: one.breaker for one in cluster.service.status().processes}
    assert found["a"] == ""
    close(cluster)


@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_a_trial_that_answers_makes_room_for_the_next(stream):
    cluster = cluster_with("a", "b", breaker_failures=1, breaker_open_s=5)
    failing = ""
    while failing != "a":
        request_id, _ = ask(cluster)
        failing = cluster.links.sent[-1][0]
        cluster.end(request_id, code="engine_error" if failing == "a" else "")
    cluster.clock.now += 6
    for name in "ab":
        cluster.beat(name)
    cluster.links.sent.clear()
    for num_trials in (1, 2, 3):
        asked = [ask(cluster, stream=stream)[0] for _ in range(4)]
        places = dict(zip(asked, sent_to(cluster)[-4:], strict=True))
        assert sent_to(cluster).count("a") == num_trials
        [trial] = [request_id for request_id, place in places.items() if place == "a"]
        cluster.say(trial, 0, "a")
    close(cluster)


@in_loop
async def test_requests_that_are_bad_themselves_open_no_breaker():
    cluster = cluster_with("a", "b", breaker_failures=1)
    for code in ("invalid_value", "context_length_exceeded", "deadline_exceeded", "aborted"):
        for _ in range(4):
            request_id, _ = ask(cluster)
            cluster.clock.now += 1
            cluster.end(request_id, code=code)
    assert all(one.breaker == "" for one in cluster.service.status().processes)
    close(cluster)


@in_loop
async def test_an_instance_that_dies_again_and_again_under_its_work_is_left_alone():
    cluster = cluster_with("a", "b", breaker_failures=2)
    for incarnation in ("2", "3"):
        for _ in range(4):
            ask(cluster)
        assert "a" in sent_to(cluster)
        cluster.change(cluster.service.view.disconnected("a"))
        cluster.clock.now += 1
        assert cluster.service.placement.breakers.num_opened == (incarnation == "3")
        cluster.join("a", incarnation)  # its old one is lost once more: that is no fault
    cluster.links.sent.clear()
    ask(cluster)
    assert sent_to(cluster) == ["b"]
    close(cluster)


@in_loop
async def test_an_idle_instance_that_comes_and_goes_opens_nothing():
    cluster = cluster_with("a", "b", breaker_failures=1)
    for incarnation in "234":
        cluster.change(cluster.service.view.disconnected("a"))
        cluster.clock.now += 1
        cluster.join("a", incarnation)
    assert cluster.service.placement.breakers.num_opened == 0
    close(cluster)
