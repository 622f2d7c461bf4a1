"""What the service makes of prompts: texts, chats, ids, and what a client had before."""

from __future__ import annotations

import asyncio
import threading

import msgspec
import pytest

from tests.router.fake_cluster import CONTEXT, TENANT, FakeCluster, ListSink, in_loop, text_model
from xllm.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from xllm.kvcache.hashing import chain_hashes
from xllm.protocol.generation import (
    LIFE_ATTEMPTS,
    ChatMessage,
    RequestFailed,
    ResumePoint,
    SubmitRequest,
)
from xllm.protocol.questions import DetokenizeIds, TokenizeText
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import pack_tokens
from xllm.router.front import Tenant
from xllm.router.state.request import RequestLife
from xllm.router.text.pool import TextPool


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
async def test_chat_goes_through_the_template():
    cluster = FakeCluster("a")
    cluster.ask(messages=(ChatMessage(role="user", content="hello"),))
    [admit] = cluster.links.admits()
    text = text_model().decode(admit.prompt_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n\n<|im_start|>assistant\n"
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
