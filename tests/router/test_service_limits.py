"""Limits of tenants, in a router's service over fakes."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.admission_cluster import ask, close, cluster_with, metrics
from tests.router.fake_cluster import ListSink, in_loop
from xllm.errors import ModelNotFoundError, RateLimitError
from xllm.protocol.bus import RouterPresence, TenantUse
from xllm.protocol.generation import SubmitRequest
from xllm.protocol.questions import DetokenizeIds, TokenizeText
from xllm.protocol.sampling import SamplingParams
from xllm.router.front import Tenant


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
