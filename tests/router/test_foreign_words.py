"""Words of an instance on a request that runs elsewhere, or in answer to another's question."""

from __future__ import annotations

import asyncio
import struct

import pytest
import structlog

from tests.router.fake_cluster import FakeCluster, in_loop, text_model
from xllm.protocol.administration import SetModelSleep
from xllm.protocol.generation import RequestFinished
from xllm.protocol.instance import (
    PooledVector,
    ProbeAnswer,
    ProbeInstance,
    PromptScores,
    RequestEnded,
    SetSleep,
    SleepSet,
    TokenBatch,
    TokenItem,
)
from xllm.protocol.sampling import TokenLogprobs

LIES = tuple(text_model().encode("lies"))


def forged(request_id, attempt=1):
    """All that an instance may say of a request, as one batch."""
    return TokenBatch(
        (TokenItem(request_id, 0, attempt, 0, LIES, "stop"),),
        (RequestEnded(request_id, attempt, "", cached_tokens=4),),
        (PromptScores(request_id, attempt, 1, (TokenLogprobs(1, -1.0),)),),
        (PooledVector(request_id, attempt, struct.pack("<2f", 1.0, 0.0)),),
    )


@pytest.mark.parametrize("code", ["", "engine_error", "worker_lost"])
@in_loop
async def test_only_who_runs_an_attempt_speaks_of_it(code):
    cluster = FakeCluster("a", "b")
    request_id, sink = cluster.ask("hello", stream=True)
    await asyncio.sleep(0)
    runs = cluster.links.sent[-1][0]
    other = "b" if runs == "a" else "a"
    metrics = cluster.service.metrics
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            cluster.service.instance_says(other, forged(request_id))
            ended = RequestEnded(request_id, 1, code)
            cluster.service.instance_says(other, TokenBatch((), (ended,)))
    assert sink.messages == []
    assert (metrics.num_foreign, metrics.num_dropped, metrics.num_moves) == (10, 0, 0)
    alarms = [one for one in logs if one["event"] == "instance_speaks_for_another"]
    assert [(one["instance"], one["request_id"]) for one in alarms] == [(other, request_id)]
    cluster.say(request_id, 0, "truth", "stop")
    cluster.end(request_id)
    assert sink.text == "truth"
    assert isinstance(sink.messages[-1], RequestFinished)
    cluster.close()


@in_loop
async def test_an_instance_that_a_request_left_does_not_speak_for_the_next_one():
    """It knows the request's id, and the next attempt is a guess."""
    cluster = FakeCluster("a", "b")
    request_id, sink = cluster.ask("hello", stream=True)
    await asyncio.sleep(0)
    first = cluster.links.sent[-1][0]
    cluster.say(request_id, 0, "tr")
    cluster.end(request_id, code="unavailable")
    assert cluster.links.sent[-1][0] != first
    cluster.service.instance_says(first, forged(request_id, attempt=2))
    assert cluster.service.metrics.num_foreign == 4
    # Late words of its own attempt are no forgery.
    cluster.service.instance_says(first, forged(request_id, attempt=1))
    assert cluster.service.metrics.num_foreign == 4
    cluster.say(request_id, 2, "uth", "stop", attempt=2)
    cluster.end(request_id, attempt=2)
    assert sink.text == "truth"
    cluster.close()


@in_loop
async def test_only_who_was_probed_answers():
    cluster = FakeCluster("a", "b")
    cluster.links.answer_probes = False
    probing = asyncio.ensure_future(cluster.service.prober.probe(["a"]))
    while not any(isinstance(one, ProbeInstance) for _, one in cluster.links.sent):
        await asyncio.sleep(0)
    [(name, probe)] = [one for one in cluster.links.sent if isinstance(one[1], ProbeInstance)]
    cluster.service.instance_says("b", ProbeAnswer(probe.nonce, True))
    cluster.service.instance_says(name, ProbeAnswer(probe.nonce, False))
    assert not await probing
    cluster.close()


@in_loop
async def test_only_who_was_told_to_sleep_says_that_it_does():
    cluster = FakeCluster("a", "b")
    asking = asyncio.ensure_future(
        cluster.service.sleeping.set_sleep(SetModelSleep(id=1, model="m", asleep=True))
    )
    while sum(isinstance(one, SetSleep) for _, one in cluster.links.sent) < 2:
        await asyncio.sleep(0)
    asked = {name: one.nonce for name, one in cluster.links.sent if isinstance(one, SetSleep)}
    for _ in range(3):
        cluster.service.instance_says("b", SleepSet(asked["a"]))
        cluster.service.instance_says("b", SleepSet(asked["b"]))
        await asyncio.sleep(0)
    assert not asking.done()
    cluster.service.instance_says("a", SleepSet(asked["a"]))
    assert (await asking).asleep
    cluster.close()
