"""Sinks and shapes without a server: order, merging, bounds, odd bytes."""

import asyncio
import json
import math

from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol.generation import ChoiceResult, RequestFailed, RequestFinished, TokenDelta, Usage
from xllm.protocol.sampling import TokenLogprobs
from xllm.router.http.answer import MERGE_FROM, StreamedAnswer, WholeAnswer, merge_deltas
from xllm.router.http.chat_shape import ChatShape
from xllm.router.http.completion_shape import CompletionShape
from xllm.router.http.event_ids import EventStage
from xllm.router.http.logprob_shape import chat_logprobs, legacy_logprobs
from xllm.router.http.shape import Envelope, total_usage


def envelope(**fields):
    return Envelope("r", 1, "m", lambda token: b"x", **fields)


def delta(choice, index, text, **fields):
    return TokenDelta(id=0, choice=choice, first_index=index, token_ids=(1,), text=text, **fields)


def finished(request_id=0, num_choices=1):
    choices = tuple(ChoiceResult(index=one, finish_reason="stop") for one in range(num_choices))
    return RequestFinished(
        id=request_id,
        request_id="r",
        choices=choices,
        usage=Usage(prompt_tokens=2, completion_tokens=3, cached_tokens=1),
    )


def failed(code="aborted"):
    return RequestFailed(id=0, code=code, message="x")


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_whole_answer_waits_for_all():
    async def scenario():
        answer = WholeAnswer(asyncio.get_running_loop(), 2)
        task = asyncio.ensure_future(answer.wait_done())
        answer.send(finished(1))
        await asyncio.sleep(0)
        assert not task.done()
        answer.send(finished(0))
        assert [one.id for one in await task] == [0, 1]
        assert answer.failure is None

    run(scenario())


def test_whole_answer_fails_at_once():
    async def scenario():
        answer = WholeAnswer(asyncio.get_running_loop(), 2)
        answer.send(failed("engine_error"))
        answer.send(failed())
        answer.send(finished(1))
        await answer.wait_done()
        assert answer.failure is not None
        assert answer.failure.code == "engine_error"

    run(scenario())


def streamed(num_requests=1, limit=1 << 20):
    overflows = []
    loop = asyncio.get_running_loop()
    answer = StreamedAnswer(loop, num_requests, limit, lambda: overflows.append(1))
    return answer, overflows


def test_streamed_answer_wakes_once_for_what_comes_together():
    async def scenario():
        answer, _ = streamed()
        task = asyncio.ensure_future(answer.take())
        await asyncio.sleep(0)
        messages = [delta(0, 0, "a"), delta(0, 1, "b"), finished()]
        for message in messages:
            answer.send(message)
        assert await task == messages
        assert answer.done
        answer.send(delta(0, 2, "late"))
        assert await answer.take() == []

    run(scenario())


def test_streamed_answer_is_bounded():
    async def scenario():
        answer, overflows = streamed(limit=100_000)
        for index in range(1000):
            answer.send(delta(0, index, "x" * 1000))
        assert answer.done
        assert overflows == [1]
        assert await answer.take() == []

    run(scenario())


def test_streamed_answer_merges_small_deltas():
    async def scenario():
        answer, overflows = streamed(limit=1 << 20)
        for index in range(20_000):
            answer.send(delta(index % 2, index // 2, "ab"))
        answer.send(finished())
        messages = await answer.take()
        assert not overflows
        assert len(messages) < 2 * MERGE_FROM + 4
        for choice in (0, 1):
            mine = [one for one in messages if isinstance(one, TokenDelta) and one.choice == choice]
            assert "".join(one.text for one in mine) == "ab" * 10_000
        assert isinstance(messages[-1], RequestFinished)

    run(scenario())


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3), st.booleans()), max_size=30))
def test_merging_keeps_every_token(items):
    messages = [
        delta(
            choice,
            index,
            text,
            logprobs=(TokenLogprobs(token_id=index, logprob=0.0),) if logprobs else None,
        )
        for index, (choice, text, logprobs) in enumerate(items)
    ]
    merged = merge_deltas([*messages, finished()])
    assert isinstance(merged[-1], RequestFinished)
    assert len(merged) <= 4
    for choice in range(3):
        before = [one for one in messages if one.choice == choice]
        after = [one for one in merged[:-1] if one.choice == choice]
        assert "".join(one.text for one in before) == "".join(one.text for one in after)
        assert [t for one in before for t in one.token_ids] == [
            t for one in after for t in one.token_ids
        ]
        ids = [[e.token_id for one in part for e in one.logprobs or ()] for part in (before, after)]
        assert ids[0] == ids[1]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_templates_carry_any_text(text):
    for shape in (ChatShape(envelope()), CompletionShape(envelope(), 1, None)):
        shape.delta(0, delta(0, 0, "first"))
        [(_, data)] = shape.delta(0, delta(0, 1, text))
        assert data.startswith(b"data: ")
        assert data.endswith(b"\n\n")
        assert data.count(b"\n") == 2
        choice = json.loads(data[6:])["choices"][0]
        assert choice.get("text", choice.get("delta", {}).get("content")) == text


def test_templates_survive_a_model_named_like_the_mark():
    shape = ChatShape(Envelope("r", 1, "\x01text\x01", lambda token: b"x"))
    events = shape.delta(0, delta(0, 0, "hello"))
    shown = json.loads(events[1][1][6:])
    assert shown["model"] == "\x01text\x01"
    assert shown["choices"][0]["delta"]["content"] == "hello"


def test_a_choice_ends_once():
    shape = ChatShape(envelope())
    stages = [EventStage.NOTHING, EventStage.LAST_TEXT, EventStage.ENDED]
    events = shape.delta(0, delta(0, 0, "a", finish_reason="stop"))
    assert [stage for stage, _ in events] == stages
    assert b'"finish_reason":"stop"' in events[-1][1]
    assert shape.finish(0, finished().choices[0]) == []
    assert b"assistant" in shape.finish(1, finished().choices[0])[0][1]
    assert shape.finish(1, finished().choices[0]) == []


def test_empty_deltas_are_no_events():
    shape = ChatShape(envelope())
    shape.delta(0, delta(0, 0, "a"))
    assert shape.delta(0, delta(0, 1, "")) == []


def test_logprobs_of_odd_bytes():
    pieces = {0: b"\xf0\x9f", 1: b"\x98\x80", 2: "é".encode()}
    entries = [
        TokenLogprobs(token_id=token, logprob=-math.inf, top_ids=(0, 1), top_logprobs=(0.0, -1.0))
        for token in pieces
    ]
    shown = chat_logprobs(entries, pieces.__getitem__)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in shown).decode() == "😀é"
    assert shown[0]["logprob"] == -9999.0
    legacy, offset = legacy_logprobs(entries, pieces.__getitem__, 5)
    assert legacy["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "é"]
    assert legacy["text_offset"] == [5, 5, 5]
    assert offset == 6
    assert legacy["top_logprobs"][2] == {
        "bytes:\\xf0\\x9f": 0.0,
        "bytes:\\x98\\x80": -1.0,
        "é": -9999.0,
    }
    assert json.dumps(legacy, allow_nan=False)


def test_usage_is_the_sum():
    usage = total_usage([finished().usage, finished().usage])
    assert usage == Usage(prompt_tokens=4, completion_tokens=6, cached_tokens=2)
