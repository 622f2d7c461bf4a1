"""The service over fakes: from a submit to its terminal message."""

from __future__ import annotations

import asyncio
import time

from tests.router.fake_cluster import FakeCluster, in_loop, text_model
from xllm.config.admission import AdmissionSettings
from xllm.kvcache.hashing import chain_hashes
from xllm.protocol.generation import RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.instance import TokenBatch, TokenItem
from xllm.router.front import Tenant
from xllm.router.state.request import RequestLife


@in_loop
async def test_a_request_from_submit_to_finish():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask(
        "the quick brown fox", max_tokens=8, cache_salt="s1", ttft_ms=900, tpot_ms=80
    )
    assert len(request_id) == 32
    [admit] = cluster.links.admits()
    assert admit.request_id == request_id
    assert admit.prompt_ids == tuple(text_model().encode("the quick brown fox"))
    assert admit.block_hashes == chain_hashes(admit.salt, admit.prompt_ids, 4)
    assert (admit.attempt, admit.outputs, admit.stages) == (1, (), (("both", "a"),))
    assert admit.timeout_ms == 600_000
    assert (admit.tenant, admit.ttft_ms, admit.tpot_ms) == ("default", 900, 80)
    assert admit.sampling.seed is not None
    assert admit.sampling.max_tokens == 8
    count = cluster.say(request_id, 0, "hello ")
    assert [type(one) for one in sink.messages] == [TokenDelta]
    cluster.say(request_id, count, "world", "length")
    cluster.end(request_id, cached=4)
    last = sink.last
    assert isinstance(last, RequestFinished)
    assert (last.id, last.request_id, last.seed) == (7, request_id, admit.sampling.seed)
    assert sink.text == "hello world"
    assert last.usage.cached_tokens == 4
    assert cluster.service.num_open == 0
    assert not cluster.links.cancels()
    cluster.close()


@in_loop
async def test_held_tokens_go_out_together_by_one_timer():
    cluster = FakeCluster("a", clock=time.monotonic)
    asked = [cluster.ask("hello", max_tokens=9, hold_ms=5) for _ in range(3)]
    for request_id, sink in asked:
        first = cluster.say(request_id, 0, "a")
        more = cluster.say(request_id, first, "b")
        cluster.say(request_id, first + more, "c")
        assert sink.text == "a"
    deadline = time.monotonic() + 5
    while any(sink.text != "abc" for _, sink in asked):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
    assert all(len(sink.messages) == 2 for _, sink in asked)
    cluster.close()


@in_loop
async def test_aborting_tells_client_and_instance_once():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask()
    cluster.service.abort("unknown")
    cluster.service.abort(request_id)
    cluster.service.abort(request_id)
    assert (sink.last.code, sink.last.request_id) == ("aborted", request_id)
    [cancel] = cluster.links.cancels()
    assert (cancel.request_id, cancel.choice) == (request_id, -1)
    cluster.say(request_id, 0, "late")  # dropped
    assert cluster.service.metrics.num_dropped == 1
    cluster.close()


@in_loop
async def test_without_an_instance_it_is_unavailable():
    cluster = FakeCluster()
    _, sink = cluster.ask()
    assert sink.last.code == "unavailable"
    cluster.join("a")
    cluster.beat("a", state="draining")
    _, sink = cluster.ask()
    assert (sink.last.code, sink.last.retry_after_ms) == ("unavailable", 1000)
    cluster.close()


@in_loop
async def test_instances_that_are_full_are_overloaded():
    """What is written to them finds no room, though they are connected."""
    cluster = FakeCluster("a", "b", admission=AdmissionSettings(queue_size=0))
    cluster.links.unreachable |= {"a", "b"}
    _, sink = cluster.ask()
    async with asyncio.timeout(5):
        await sink.done.wait()
    assert (sink.last.code, sink.last.retry_after_ms) == ("overloaded", 1000)
    assert cluster.service.dispatcher.statistics().num_homeless == 0
    cluster.close()


@in_loop
async def test_a_fault_in_a_tick_or_an_abort_ends_that_request_only(monkeypatch):
    cluster = FakeCluster("a")
    (_, first), (second, other), (_, good) = [cluster.ask(timeout_ms=100) for _ in range(3)]
    monkeypatch.setattr(RequestLife, "cancel", lambda *args: 1 // 0)
    cluster.service.abort(second)
    assert other.last.code == "internal_error"
    expire = RequestLife.expire
    broken = iter([True])
    monkeypatch.setattr(
        RequestLife,
        "expire",
        lambda state, now: 1 // 0 if next(broken, False) else expire(state, now),
    )
    cluster.clock.now += 1
    cluster.tick()
    assert (first.last.code, good.last.code) == ("internal_error", "deadline_exceeded")
    monkeypatch.undo()
    cluster.close()


@in_loop
async def test_deadlines_end_requests():
    cluster = FakeCluster("a")
    _, sink = cluster.ask(timeout_ms=500)
    cluster.clock.now += 0.4
    cluster.tick()
    assert not sink.messages
    cluster.clock.now += 0.2
    cluster.tick()
    assert sink.last.code == "deadline_exceeded"
    assert len(cluster.links.cancels()) == 1
    cluster.close()


@in_loop
async def test_a_longer_timeout_than_the_routers_is_the_routers():
    cluster = FakeCluster("a", timeout_s=30)
    cluster.ask(timeout_ms=600_000)
    assert [admit.timeout_ms for admit in cluster.links.admits()] == [30_000]
    cluster.close()


@in_loop
async def test_more_than_max_inflight_are_refused():
    cluster = FakeCluster("a", max_inflight=2)
    cluster.ask()
    second, _ = cluster.ask()
    _, refused = cluster.ask()
    assert (refused.last.code, refused.last.retry_after_ms) == ("overloaded", 1000)
    cluster.service.abort(second)
    _, sink = cluster.ask()
    assert not sink.messages
    cluster.close()


@in_loop
async def test_draining_lets_open_requests_end_and_fails_the_rest():
    cluster = FakeCluster("a")
    first, ended = cluster.ask(max_tokens=2)
    _, cut = cluster.ask()
    drain = asyncio.ensure_future(cluster.service.drain(0.05))
    await asyncio.sleep(0)
    _, refused = cluster.ask()
    assert refused.last.code == "unavailable"
    cluster.say(first, 0, "a", "length")
    cluster.end(first)
    assert await drain == 1
    assert isinstance(ended.last, RequestFinished)
    assert cut.last.code == "aborted"
    assert not (await cluster.service.health(False)).ready
    cluster.close()


@in_loop
async def test_salts_keep_prefixes_apart():
    cluster = FakeCluster("a")
    cluster.ask("one two three four", cache_salt="x")
    cluster.ask("one two three four", cache_salt="x")
    cluster.ask("one two three four", cache_salt="y")
    cluster.ask("one two three four")
    first, second, third, fourth = (word.block_hashes for word in cluster.links.admits())
    assert first == second
    assert len({first, third, fourth}) == 3
    cluster.close()


@in_loop
async def test_a_sink_that_raises_harms_nobody():
    cluster = FakeCluster("a")

    class BadSink:
        def send(self, message):
            raise RuntimeError("front end bug")

    bad = cluster.service.submit(SubmitRequest(id=1, prompt="x"), Tenant(), BadSink())
    good, sink = cluster.ask(max_tokens=5)
    ids = tuple(text_model().encode("a"))
    items = (TokenItem(bad, 0, 1, 0, ids), TokenItem(good, 0, 1, 0, ids, "length"))
    cluster.service.instance_says("a", TokenBatch(items))
    cluster.end(good)
    assert isinstance(sink.last, RequestFinished)
    cluster.close()
