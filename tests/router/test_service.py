"""The service over fakes: from a submit to its terminal message, and the questions."""

from __future__ import annotations

import asyncio
import threading
import time

import msgspec
import pytest

from tests.router.fake_cluster import (
    CONTEXT,
    TENANT,
    FakeCluster,
    ListSink,
    in_loop,
    text_model,
)
from xllm.config.admission import AdmissionSettings
from xllm.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from xllm.kvcache.hashing import chain_hashes
from xllm.protocol.bus import DaemonHeartbeat, InstanceLoad, RouterPresence, WorkerState
from xllm.protocol.client import (
    LIFE_ATTEMPTS,
    ChatMessage,
    DetokenizeIds,
    RequestFailed,
    RequestFinished,
    ResumePoint,
    SubmitRequest,
    TokenDelta,
    TokenizeText,
)
from xllm.protocol.instance import TokenBatch, TokenItem
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import pack_tokens
from xllm.router.front import Tenant
from xllm.router.state.move_budget import MOVE_BURST
from xllm.router.state.moves import PATIENCE_S
from xllm.router.state.request import RequestLife
from xllm.router.text.pool import TextPool


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
async def test_requests_of_a_lost_instance_go_on_elsewhere():
    cluster = FakeCluster("a", "b")
    asked = [cluster.ask(max_tokens=30) for _ in range(4)]
    there = {word.request_id: name for name, word in cluster.links.sent}
    assert sorted(there.values()) == ["a", "a", "b", "b"]
    for request_id, _ in asked:
        cluster.say(request_id, 0, "hello")
    cluster.links.unreachable.add("a")
    cluster.change(cluster.service.view.disconnected("a"))
    moved = [word for _, word in cluster.links.sent[4:]]
    assert sorted(word.request_id for word in moved) == sorted(
        request_id for request_id, name in there.items() if name == "a"
    )
    assert all(
        word.attempt == 2 and word.outputs == (tuple(text_model().encode("hello")),)
        for word in moved
    )
    for request_id, sink in asked:
        attempt = 2 if there[request_id] == "a" else 1
        count = len(text_model().encode("hello"))
        cluster.say(request_id, count, " world", "length", attempt)
        cluster.end(request_id, attempt)
        assert sink.text == "hello world"
    assert cluster.service.metrics.num_moves == 2
    assert all(one.num_inflight == 0 for one in cluster.service.view)
    cluster.close()


@in_loop
async def test_a_request_waits_for_its_only_instance_to_come_back():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask(max_tokens=5)
    cluster.change(cluster.service.view.disconnected("a"))
    cluster.tick()
    assert not sink.messages
    statistics = cluster.service.dispatcher.statistics()
    assert (statistics.num_open, statistics.num_homeless) == (1, 1)
    cluster.join("a", "2")
    assert [word.attempt for word in cluster.links.admits()] == [1, 2]
    cluster.say(request_id, 0, "a", "length", 2)
    cluster.end(request_id, 2)
    assert isinstance(sink.last, RequestFinished)
    cluster.close()


@in_loop
async def test_a_refusing_instance_is_asked_again_after_its_next_heartbeat():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask(max_tokens=5)
    cluster.say(request_id, 0, "a")
    cluster.end(request_id, code="unavailable")
    for _ in range(20):
        cluster.clock.now += 0.01
        cluster.tick()
    _, refused = cluster.ask()
    assert refused.last.code == "unavailable"
    cluster.beat("a", state="loading")
    assert len(cluster.links.admits()) == 1
    cluster.beat("a")
    cluster.say(request_id, 1, "b", "length", 2)
    cluster.end(request_id, 2)
    assert sink.text == "ab"
    assert isinstance(sink.last, RequestFinished)
    cluster.close()


@in_loop
async def test_a_silent_instance_keeps_its_requests_until_there_is_a_better_place():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask(max_tokens=9)
    cluster.say(request_id, 0, "a")
    for _ in range(9):
        cluster.clock.now += 0.1
        cluster.tick()
    assert [one.suspect for one in cluster.service.view] == [True]
    cluster.say(request_id, 1, "b")  # it was only slow
    cluster.join("b")
    [first, second] = cluster.links.admits()
    assert (first.attempt, second.attempt, len(second.outputs[0])) == (1, 2, 2)
    assert cluster.links.sent[-1][0] == "b"
    cluster.say(request_id, 2, "c", "length", 2)
    cluster.end(request_id, 2)
    assert sink.text == "abc"
    cluster.close()


@in_loop
async def test_nobody_comes_back_forever():
    cluster = FakeCluster("a")
    _, sink = cluster.ask()
    cluster.change(cluster.service.view.deregistered("a"))
    cluster.change(cluster.service.view.disconnected("a"))
    cluster.tick()
    for _ in range(40):
        cluster.clock.now += 1
        cluster.tick()
    assert sink.last.code == "unavailable"
    cluster.close()


@in_loop
async def test_an_unreachable_instance_does_not_get_stuck_requests():
    cluster = FakeCluster("a", "b")
    cluster.links.unreachable.add("a")
    for _ in range(2):
        cluster.ask()
    for _ in range(20):
        await asyncio.sleep(0)
    assert {name for name, _ in cluster.links.sent} == {"b"}
    cluster.service.dispatcher.check()
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
async def test_a_fault_in_one_request_does_not_keep_others_where_they_are(monkeypatch):
    cluster = FakeCluster("a", "b")
    asked = [cluster.ask(max_tokens=9) for _ in range(6)]
    there = [cluster.service.dispatcher.open[request_id] for request_id, _ in asked]
    on_a = [one for one in there if one.placed == "a"]
    assert len(on_a) == 3

    def break_down(state, *args, **kwargs):
        if state is on_a[0].state:
            raise RuntimeError("a bug")
        return lose(state, *args, **kwargs)

    lose = RequestLife.instance_lost
    monkeypatch.setattr(RequestLife, "instance_lost", break_down)
    cluster.links.unreachable.add("a")
    cluster.change(cluster.service.view.disconnected("a"))
    sinks = {one: sink for one, (_, sink) in zip(there, asked, strict=True)}
    assert sinks[on_a[0]].last.code == "internal_error"
    assert [one.placed for one in on_a[1:]] == ["b", "b"]
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
async def test_long_texts_are_encoded_in_a_thread():
    cluster = FakeCluster("a")
    text = "a b c d " * 700
    assert len(text) > 4096
    request_id, sink = cluster.ask(text)
    assert not cluster.links.admits()
    await asyncio.wait_for(sink.done.wait(), 10)
    assert sink.last.code == "context_length_exceeded"
    assert str(CONTEXT) in sink.last.message
    aborted, sink = cluster.ask(text)
    cluster.service.abort(aborted)
    assert sink.last.code == "aborted"
    late, sink = cluster.ask(text, timeout_ms=10)
    cluster.clock.now += 1
    cluster.tick()
    assert sink.last.code == "deadline_exceeded"
    assert cluster.service.num_open == 0
    assert len({request_id, aborted, late}) == 3
    cluster.close()


@in_loop
async def test_a_text_of_five_megabytes_is_refused_by_its_bytes(monkeypatch):
    cluster = FakeCluster("a")
    text = cluster.service.served.first.text
    worked = []
    for name in ("pack", "render"):
        monkeypatch.setattr(text, name, lambda *args, **fields: worked.append(args))
    huge = "a b c d " * 650_000
    for fields in (
        {"prompt": huge},
        {"prompt": None, "messages": (ChatMessage(role="user", content=huge),)},
    ):
        sink = ListSink()
        cluster.service.submit(SubmitRequest(id=1, **fields), Tenant(), sink)
        assert sink.last.code == "context_length_exceeded"  # at once, and in no thread
    assert not worked
    assert cluster.service.num_open == 0
    cluster.close()


@pytest.mark.parametrize("length", [1, 3, 63, 64, 100])
@in_loop
async def test_a_packed_prompt_is_the_same_prompt(length):
    cluster = FakeCluster("a")
    prompt = tuple(range(3, 3 + length))
    sinks = [ListSink(), ListSink()]
    ways = ({"prompt": prompt}, {"packed_prompt": pack_tokens(prompt)})
    for way, sink in zip(ways, sinks, strict=True):
        asked = SubmitRequest(id=1, sampling=SamplingParams(seed=3, max_tokens=1), **way)
        request_id = cluster.service.submit(asked, Tenant(), sink)
        cluster.say(request_id, 0, "h", "length")
        cluster.end(request_id)
    first, second = (
        msgspec.structs.replace(one, request_id="", timeout_ms=0) for one in cluster.links.admits()
    )
    assert first == second
    assert bool(first.packed_prompt) == (length >= 64)
    assert sinks[0].last.choices == sinks[1].last.choices
    assert sinks[1].last.usage.prompt_tokens == length


@in_loop
async def test_a_long_prompt_travels_as_bytes_and_moves_with_them():
    cluster = FakeCluster("a", "b")
    prompt = tuple(range(3, 103))
    request_id, sink = cluster.ask(prompt, max_tokens=2)
    (admit,) = cluster.links.admits()
    assert (admit.prompt_ids, admit.packed_prompt) == ((), pack_tokens(prompt))
    assert admit.block_hashes == chain_hashes(admit.salt, prompt, 4)
    cluster.change(cluster.service.view.disconnected(cluster.links.sent[-1][0]))
    again = cluster.links.admits()[-1]
    assert again.attempt == admit.attempt + 1
    assert (again.prompt_ids, again.packed_prompt) == ((), admit.packed_prompt)
    cluster.say(request_id, 0, "hello", "length", attempt=again.attempt)
    cluster.end(request_id, attempt=again.attempt)
    assert sink.last.usage.prompt_tokens == len(prompt)
    text = "a b c d " * 40
    _, sink = cluster.ask(text, max_tokens=1)
    ids = tuple(text_model().encode(text))
    admit = cluster.links.admits()[-1]
    assert admit.packed_prompt == pack_tokens(ids)
    assert admit.block_hashes == chain_hashes(admit.salt, ids, 4)
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
async def test_a_resume_goes_on_under_the_next_attempt():
    cluster = FakeCluster("a")
    ids = tuple(text_model().encode("hello "))
    point = ResumePoint(attempt=4, outputs=(ids,), seed=99)
    request_id, sink = cluster.ask("hi", max_tokens=20, resume=point)
    [admit] = cluster.links.admits()
    assert (admit.attempt, admit.outputs, admit.sampling.seed) == (
        LIFE_ATTEMPTS,
        (ids,),
        99,
    )
    cluster.say(request_id, len(ids), "world", "length", LIFE_ATTEMPTS)
    cluster.end(request_id, LIFE_ATTEMPTS)
    assert sink.text == "world"
    assert sink.messages[0].first_index == len(ids)
    cluster.close()


@in_loop
async def test_a_resume_of_more_than_the_context_takes_is_refused():
    cluster = FakeCluster("a")
    prompt = (5,) * 100
    for num_held, is_refused in ((CONTEXT - 100, False), (CONTEXT - 99, True)):
        point = ResumePoint(attempt=1, outputs=((5,) * num_held,), seed=3)
        _, sink = cluster.ask(prompt, resume=point)
        assert isinstance(sink.last, RequestFailed) == is_refused
    assert sink.last.param == "resume.outputs"
    assert not cluster.links.sent
    cluster.close()


@in_loop
async def test_a_long_resume_is_prepared_in_a_thread(monkeypatch):
    monkeypatch.setattr("xllm.router.submission.is_long_request", lambda request: True)
    threads = []
    resume = RequestLife.resume
    monkeypatch.setattr(
        RequestLife,
        "resume",
        lambda state, point: threads.append(threading.current_thread()) or resume(state, point),
    )
    cluster = FakeCluster("a")
    ids = tuple(text_model().encode("hello "))
    point = ResumePoint(attempt=1, outputs=(ids,), seed=9)
    request_id, sink = cluster.ask("hi", max_tokens=20, resume=point)
    assert not cluster.links.admits()
    async with asyncio.timeout(10):
        while not cluster.links.admits():
            await asyncio.sleep(0.001)
    assert threads[0] is not threading.main_thread()
    cluster.say(request_id, len(ids), "world", "length", LIFE_ATTEMPTS)
    cluster.end(request_id, LIFE_ATTEMPTS)
    assert sink.text == "world"
    cluster.close()


@in_loop
async def test_a_longer_timeout_than_the_routers_is_the_routers():
    cluster = FakeCluster("a", timeout_s=30)
    cluster.ask(timeout_ms=600_000)
    assert [admit.timeout_ms for admit in cluster.links.admits()] == [30_000]
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


@in_loop
async def test_chat_goes_through_the_template():
    cluster = FakeCluster("a")
    cluster.ask(messages=(ChatMessage(role="user", content="hello"),))
    [admit] = cluster.links.admits()
    text = text_model().decode(admit.prompt_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n\n<|im_start|>assistant\n"
    cluster.close()


@in_loop
@pytest.mark.parametrize("single_tenant", [False, True])
async def test_what_is_tokenized_shortens_the_work_of_its_tenant_only(monkeypatch, single_tenant):
    cluster = FakeCluster("a", single_tenant=single_tenant)
    text = cluster.service.served.first.text
    owners = []
    pack = type(text).pack

    def spy(self, text, add_special_tokens=True, owner=b""):
        owners.append(owner)
        return pack(self, text, add_special_tokens, owner)

    monkeypatch.setattr(type(text), "pack", spy)
    talk = (ChatMessage(role="user", content="hello"),)
    for salt in (b"1", b"2"):
        tenant = Tenant("t", salt)
        for question in ({"text": "hello"}, {"messages": talk}, {"messages": talk * 70}):
            await cluster.service.tokenize(TokenizeText(id=1, **question), tenant)
        asked = SubmitRequest(id=1, prompt="hello", sampling=SamplingParams(max_tokens=1))
        cluster.service.submit(asked, tenant, ListSink())
    expected = [b""] if single_tenant else [b"1", b"2"]
    assert sorted(set(owners)) == expected
    assert len(owners) == 8
    cluster.close()


@in_loop
async def test_models_tokenize_and_detokenize():
    cluster = FakeCluster("a")
    service = cluster.service
    [info] = service.models()
    assert (info.name, info.max_model_len, info.ready) == ("m", CONTEXT, True)
    answer = await service.tokenize(TokenizeText(id=3, text="hello world"), TENANT)
    assert (answer.id, answer.max_model_len) == (3, CONTEXT)
    back = await service.detokenize(DetokenizeIds(id=4, token_ids=answer.token_ids), TENANT)
    assert back.text == "hello world"
    long = await service.tokenize(TokenizeText(id=3, text="hello " * 900), TENANT)
    assert list(long.token_ids) == text_model().encode("hello " * 900)
    talk = (ChatMessage(role="user", content="x"),)
    assert (await service.tokenize(TokenizeText(id=1, messages=talk), TENANT)).token_ids
    for bad in (
        TokenizeText(id=1),
        TokenizeText(id=1, text="x", messages=talk),
        TokenizeText(id=1, text="x" * 10**6),
    ):
        with pytest.raises(Exception, match="text"):
            await service.tokenize(bad, TENANT)
    with pytest.raises(InvalidRequestError):
        await service.detokenize(DetokenizeIds(id=1, token_ids=(-1,)), TENANT)
    with pytest.raises(ContextLengthError, match=str(CONTEXT)):
        await service.detokenize(DetokenizeIds(id=1, token_ids=(5,) * (CONTEXT + 1)), TENANT)
    with pytest.raises(ModelNotFoundError):
        await service.detokenize(DetokenizeIds(id=1, model="other"), TENANT)
    assert service.token_bytes("m", answer.token_ids[0])
    cluster.close()


@in_loop
async def test_health_says_what_the_data_path_says():
    cluster = FakeCluster()
    report = await cluster.service.health(True)
    assert (report.live, report.ready) == (True, False)
    cluster.join("a")
    reports = await asyncio.gather(*(cluster.service.health(True) for _ in range(5)))
    assert all(one.ready and not one.degraded for one in reports)
    assert len(cluster.links.sent) == 1
    cluster.links.answer_probes = False
    started = time.monotonic()
    report = await cluster.service.health(True)
    assert 0.9 < time.monotonic() - started < 3
    assert not report.ready
    assert report.degraded
    assert (await cluster.service.health(False)).ready
    cluster.close()


@in_loop
async def test_status_shows_the_workers_of_an_instance():
    cluster = FakeCluster("a", "b")
    workers = (WorkerState("a/worker-0", "ready", 30, "cpu"), WorkerState("a/worker-1", "loading"))
    cluster.beat("a", workers=workers)
    shown = [one for one in cluster.service.status().processes if one.kind != "router"]
    assert [(one.name, one.kind, one.state) for one in shown] == [
        ("a", "instance", "ready"),
        ("a/worker-0", "worker", "ready"),
        ("a/worker-1", "worker", "loading"),
        ("b", "instance", "ready"),  # it says nothing of its workers
    ]
    assert shown[1].heartbeat_age_ms - shown[0].heartbeat_age_ms == 30
    cluster.clock.now += 60.0
    cluster.tick()
    states = [one.state for one in cluster.service.status().processes if one.kind == "worker"]
    assert states == ["unknown", "unknown"]
    cluster.close()


@in_loop
async def test_status_and_metrics_show_all_processes():
    cluster = FakeCluster("a")
    text = b'# HELP steps_total S.\n# TYPE steps_total counter\nsteps_total{role="worker"} 3\n'
    cluster.beat("a", load=InstanceLoad(num_running=2), metrics=text)
    cluster.service.heard(DaemonHeartbeat("d", "1", 1))
    cluster.service.heard(RouterPresence("r2", "1", 1, (("a", 2), ("b", 3))))
    known = {one.name: one for one in cluster.service.status().processes}
    kinds = {name: one.kind for name, one in known.items()}
    assert kinds == {"router": "router", "r2": "router", "a": "instance", "d": "daemon"}
    assert known["r2"].num_running == 5
    assert known["d"].num_blocks == 0  # it holds nothing that says how large a block is
    cluster.service.heard(
        DaemonHeartbeat("d", "1", 2, dram_blocks=3, dram_bytes=300, dram_capacity_bytes=1000)
    )
    daemon = cluster.service.status().processes[-1]
    assert (daemon.num_blocks, daemon.num_free_blocks) == (10, 7)
    request_id, _ = cluster.ask(max_tokens=1)
    cluster.say(request_id, 0, "a", "length")
    cluster.end(request_id)
    page = cluster.service.metrics_text().decode()
    assert 'steps_total{role="worker",instance="a"} 3' in page
    assert 'xllm_router_requests_total{code="ok",role="router",instance="router"} 1.0' in page
    assert 'xllm_router_ttft_seconds_bucket{le="+Inf",role="router",instance="router"} 1.0' in page
    cluster.close()


@in_loop
async def test_a_tenants_long_texts_wait_for_its_own():
    pool = TextPool(num_threads=2, per_tenant=1)
    order = []

    def job(name):
        order.append(name)
        return name

    hold = threading.Event()
    slow = pool.run("greedy", hold.wait)
    rest = [pool.run("greedy", lambda k=k: job(k)) for k in range(3)]
    assert await pool.run("other", lambda: job("other")) == "other"
    assert order == ["other"]
    assert pool.num_waiting == 3
    rest[0].cancel()
    hold.set()
    assert await slow
    assert await asyncio.gather(*rest[1:]) == [1, 2]
    assert order == ["other", 1, 2]
    failing = pool.run("x", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        await failing
    pool.close()


@in_loop
async def test_a_session_goes_to_one_instance_and_survives_its_end():
    cluster = FakeCluster("a", "b", "c")
    for _ in range(6):
        cluster.ask(session="talk")
    homes = {name for name, _ in cluster.links.sent}
    assert len(homes) == 1
    [home] = homes
    cluster.links.unreachable.add(home)
    cluster.change(cluster.service.view.disconnected(home))
    second = {name for name, _ in cluster.links.sent[6:]}
    assert len(second) == 1
    assert second != homes
    assert all(word.attempt == 2 for _, word in cluster.links.sent[6:])
    _, sink = cluster.ask(session="x" * 257)
    assert (sink.last.code, sink.last.param) == ("invalid_value", "session")
    cluster.close()


@in_loop
async def test_a_draining_refusing_or_silent_instance_is_never_chosen():
    for harm in ("draining", "refusing", "suspect", "disconnected"):
        cluster = FakeCluster("a", "b", policy="prefix-aware")
        if harm == "draining":
            cluster.beat("a", state="draining")
        elif harm == "refusing":
            cluster.service.view.refused("a")
        elif harm == "suspect":
            for _ in range(9):
                cluster.clock.now += 0.1
                cluster.beat("b")
                cluster.tick()
        else:
            cluster.change(cluster.service.view.disconnected("a"))
        for _ in range(5):
            cluster.ask(session="talk")
            cluster.ask()
        assert {name for name, _ in cluster.links.sent} == {"b"}, harm
        cluster.close()


@in_loop
async def test_a_first_move_is_free_and_further_ones_wait_for_the_budget():
    cluster = FakeCluster("a", "b")
    num = int(MOVE_BURST) + 100
    asked = [cluster.ask(max_tokens=5) for _ in range(num)]

    def lose_all(attempt):
        for request_id, _ in asked:
            cluster.say(request_id, 9, "x", attempt=attempt)  # tokens before it are missing

    lose_all(1)  # everyone's first move goes through, budget or not
    assert len(cluster.links.admits()) == 2 * num
    assert cluster.service.metrics.num_held_back == 0
    lose_all(2)
    moved = len(cluster.links.admits()) - 2 * num
    assert int(MOVE_BURST) <= moved < num
    assert cluster.service.metrics.num_held_back == num - moved
    assert b"xllm_router_moves_held_back_total{" in cluster.service.metrics_text()
    for _ in range(100):  # everybody's turn comes, with time
        cluster.clock.now += 0.1
        for name in ("a", "b"):
            cluster.beat(name)
        cluster.tick()
    assert len(cluster.links.admits()) == 3 * num
    assert not any(sink.done.is_set() for _, sink in asked)
    for request_id, _ in asked:
        cluster.service.abort(request_id)
    assert all(isinstance(sink.last, RequestFailed) for _, sink in asked)
    cluster.close()


@in_loop
async def test_a_move_is_not_held_back_forever():
    cluster = FakeCluster("a", "b")
    request_id, sink = cluster.ask(max_tokens=5)
    for attempt in (1, 2):
        cluster.service.dispatcher._budget.left = -1e9
        cluster.say(request_id, 9, "x", attempt=attempt)
    assert len(cluster.links.admits()) == 2
    for _ in range(8):
        assert not sink.done.is_set()
        cluster.clock.now += PATIENCE_S / 8 + 0.1
        for name in ("a", "b"):
            cluster.beat(name)
        cluster.tick()
    cluster.clock.now += 0.1
    cluster.tick()
    assert sink.last.code == "unavailable"
    cluster.close()
