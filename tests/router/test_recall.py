"""Streams that go on behind tokens which an instance still has: asked for, proven, taken over."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.router.admission_cluster import BUSY, IDLE
from tests.router.fake_cluster import TENANT, FakeCluster, ListSink, in_loop, text_model
from tests.router.fake_instance import MODEL, drawn
from tests.router.http.front_thread import sse_blocks
from tests.router.router_bench import until
from xllm.config.admission import AdmissionSettings
from xllm.protocol.generation import RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.instance import HeldTokens, QueryTokens
from xllm.protocol.sampling import SamplingParams
from xllm.router import recall
from xllm.router.recall import Recall

# -- asking ---------------------------------------------------------------------------------------


def questions(cluster: FakeCluster) -> list[tuple[str, QueryTokens]]:
    return [(name, one) for name, one in cluster.links.sent if isinstance(one, QueryTokens)]


def begin(cluster: FakeCluster, proven=lambda outputs: outputs, model: str = "m") -> asyncio.Task:
    return asyncio.ensure_future(cluster.service.recaller.recall(model, Recall("r", proven)))


def answer(cluster: FakeCluster, name: str, outputs=()) -> None:
    [number] = [one.number for asked, one in questions(cluster) if asked == name]
    cluster.service.instance_says(name, HeldTokens(number, outputs))


@in_loop
async def test_every_instance_of_the_model_is_asked_and_the_first_proof_taken():
    cluster = FakeCluster("a", "b", "c", "away")
    cluster.change(cluster.service.view.disconnected("away"))
    assert not await begin(cluster, model="other")
    assert not questions(cluster)
    task = begin(cluster, lambda outputs: [ids if ids == (1, 2) else () for ids in outputs])
    await asyncio.sleep(0)
    assert [(name, one.request_id) for name, one in questions(cluster)] == [
        ("a", "r"),
        ("b", "r"),
        ("c", "r"),
    ]
    answer(cluster, "a")
    answer(cluster, "b", ((9, 9),))
    await asyncio.sleep(0)
    assert not task.done()
    answer(cluster, "c", ((1, 2),))
    assert await task == [(1, 2)]
    answer(cluster, "a", ((1, 2),))  # late, or double
    assert "xllm_router_recalled_total" in cluster.service.metrics_text().decode()
    assert cluster.service.metrics.num_recalled == 1
    cluster.close()


@in_loop
async def test_nobody_answers_for_another():
    cluster = FakeCluster("a", "b")
    task = begin(cluster)
    await asyncio.sleep(0)
    numbers = {name: one.number for name, one in questions(cluster)}
    cluster.service.instance_says("a", HeldTokens(numbers["b"], ((9,),)))
    await asyncio.sleep(0)
    assert not task.done()
    answer(cluster, "b", ((1, 2),))
    assert await task == ((1, 2),)
    cluster.close()


@in_loop
async def test_nobody_has_it_nobody_is_there_nobody_can_be_reached():
    cluster = FakeCluster("a", "b")
    task = begin(cluster)
    await asyncio.sleep(0)
    answer(cluster, "a")
    answer(cluster, "b")
    assert not any(await task)
    assert not any(await begin(FakeCluster()))
    cluster.links.unreachable |= {"a", "b"}
    assert not any(await begin(cluster))
    assert cluster.service.metrics.num_recalled == 0
    cluster.close()


@in_loop
async def test_whoever_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(recall, "RECALL_S", 0.01)
    cluster = FakeCluster("a")
    assert not any(await begin(cluster))
    answer(cluster, "a", ((1,),))
    cluster.close()


@in_loop
async def test_so_many_are_asked_for_at_once_and_the_others_wait_their_turn(monkeypatch):
    monkeypatch.setattr(recall, "RECALL_S", 10.0)
    cluster = FakeCluster("a")
    tasks = [begin(cluster) for _ in range(recall.MAX_AT_ONCE + 2)]
    await settle()
    numbers = [one.number for _, one in questions(cluster)]
    assert len(numbers) == recall.MAX_AT_ONCE
    cluster.service.instance_says("a", HeldTokens(numbers[0], ((1,),)))
    await settle()
    assert len(questions(cluster)) == recall.MAX_AT_ONCE + 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not cluster.service.recaller._waiting
    last = begin(cluster)
    await settle()
    assert len(questions(cluster)) == recall.MAX_AT_ONCE + 2
    cluster.service.instance_says("a", HeldTokens(questions(cluster)[-1][1].number, ((2,),)))
    assert await last == ((2,),)
    cluster.close()


@in_loop
async def test_who_has_no_turn_in_time_does_without(monkeypatch):
    monkeypatch.setattr(recall, "RECALL_S", 0.02)
    cluster = FakeCluster("a")
    tasks = [begin(cluster) for _ in range(2 * recall.MAX_AT_ONCE)]
    assert not any(await asyncio.gather(*tasks))
    assert recall.MAX_AT_ONCE <= len(questions(cluster)) <= 2 * recall.MAX_AT_ONCE
    assert not cluster.service.recaller._waiting
    cluster.close()


# -- being let in ---------------------------------------------------------------------------------


async def settle() -> None:
    """What is ready in the loop runs."""
    for _ in range(5):
        await asyncio.sleep(0)


def submit(cluster: FakeCluster, borders=(2,), model="", **options) -> tuple[str, ListSink]:
    sink = ListSink()
    sampling = SamplingParams(max_tokens=20, **options)
    request = SubmitRequest(id=7, model=model, prompt="hello", sampling=sampling)
    asked = Recall("lost", lambda outputs: outputs)
    return cluster.service.submit(request, TENANT, sink, borders, asked), sink


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"requests_per_minute": 1}, "rate_limit_exceeded"),
        ({"concurrency": 1}, "rate_limit_exceeded"),
        ({"tokens_per_minute": 10}, "rate_limit_exceeded"),
        ({"instance_waiting": 1, "queue_size": 1}, "overloaded"),
    ],
)
@in_loop
async def test_nobody_is_asked_for_a_request_that_is_not_let_in(limits, code):
    cluster = FakeCluster("a", admission=AdmissionSettings(**limits))
    if "queue_size" in limits:
        cluster.beat("a", load=BUSY)
    cluster.ask([70] * 10)
    _, sink = submit(cluster)
    await settle()
    assert sink.last.code == code
    assert not questions(cluster)
    cluster.close()


@pytest.mark.parametrize("how", ["unknown model", "asleep", "draining", "too many"])
@in_loop
async def test_nobody_is_asked_for_a_request_that_cannot_be_served(how):
    cluster = FakeCluster("a", max_inflight=1)
    if how == "asleep":
        cluster.beat("a", state="asleep")
    elif how == "too many":
        cluster.ask()
    cluster.service.submission.draining = how == "draining"
    _, sink = submit(cluster, model="other" if how == "unknown model" else "")
    await settle()
    assert sink.done.is_set()
    assert not questions(cluster)
    cluster.close()


@pytest.mark.parametrize("how", ["abort", "deadline"])
@in_loop
async def test_a_request_that_ends_while_instances_are_asked_is_forgotten(how):
    cluster = FakeCluster("a", timeout_s=5.0, admission=AdmissionSettings(concurrency=1))
    request_id, sink = submit(cluster)
    await settle()
    assert len(questions(cluster)) == 1
    if how == "abort":
        cluster.service.abort(request_id)
    else:
        cluster.clock.now += 6
        cluster.tick()
    assert sink.last.code == ("aborted" if how == "abort" else "deadline_exceeded")
    await settle()
    answer(cluster, "a", ((1, 2),))
    await settle()
    assert not cluster.links.admits()
    assert not cluster.service.recaller._waiting
    _, after = submit(cluster)
    assert not after.messages  # it counts as open no more
    cluster.close()
    await settle()


# -- taking over ----------------------------------------------------------------------------------


async def take_over(
    cluster: FakeCluster, known, borders, then=lambda: None, **options
) -> tuple[str, ListSink]:
    """`then`: what happens after the instance's answer, before anything comes of it."""
    request_id, sink = submit(cluster, borders, **options)
    await settle()
    answer(cluster, "a", known)
    then()
    await settle()
    return request_id, sink


@pytest.mark.parametrize("waits", [False, True])
@in_loop
async def test_it_goes_on_behind_them_as_if_it_had_moved(waits):
    limits = AdmissionSettings(requests_per_minute=60, concurrency=1, instance_waiting=1)
    cluster = FakeCluster("a", admission=limits)
    cluster.beat("a", load=BUSY if waits else IDLE)
    ids = tuple(text_model().encode("the quick"))
    request_id, sink = await take_over(cluster, (ids,), (len(ids),))
    assert len(sink.messages) == (0 if waits else 1)
    if waits:
        cluster.beat("a", load=IDLE)
        cluster.tick()
    [first] = sink.messages
    assert (first.first_index, first.token_ids, first.text) == (0, ids, "the quick")
    [admit] = cluster.links.admits()
    assert (admit.attempt, admit.outputs) == (2, (ids,))
    cluster.say(request_id, len(ids), " fox", "length", attempt=2)
    cluster.end(request_id, attempt=2)
    assert sink.text == "the quick fox"
    assert isinstance(sink.last, RequestFinished)
    assert sink.last.usage.completion_tokens == len(ids) + len(text_model().encode(" fox"))
    cluster.close()


@in_loop
async def test_choices_of_which_nothing_is_known_are_drawn_again():
    cluster = FakeCluster("a")
    ids = tuple(text_model().encode("the"))
    request_id, sink = await take_over(cluster, ((), ids), (2, len(ids)), n=2)
    [admit] = cluster.links.admits()
    assert admit.outputs == ((), ids)
    assert [(one.choice, one.text) for one in sink.messages] == [(1, "the")]
    cluster.say(request_id, 0, "a quick", attempt=2)
    deltas = [one for one in sink.messages if isinstance(one, TokenDelta) and one.choice == 0]
    assert len(deltas[0].token_ids) == 2  # it ends at the border
    cluster.service.abort(request_id)
    assert sink.last.code == "aborted"
    assert [one.attempt for one in cluster.links.cancels()] == [2]
    cluster.close()


@in_loop
async def test_it_waits_for_an_instance_where_there_is_none():
    cluster = FakeCluster("a")
    ids = tuple(text_model().encode("the"))

    def leave() -> None:
        cluster.change(cluster.service.view.disconnected("a"))

    _, sink = await take_over(cluster, (ids,), (len(ids),), leave)
    cluster.tick()
    assert not sink.done.is_set()
    cluster.change(cluster.service.view.connected("a"))
    cluster.beat("a")
    assert [word.outputs for word in cluster.links.admits()] == [(ids,)]
    cluster.close()


@in_loop
async def test_known_tokens_are_not_charged_again():
    cluster = FakeCluster("a", admission=AdmissionSettings(tokens_per_minute=1000))
    ids = tuple(text_model().encode("the quick brown"))
    request_id, _ = await take_over(cluster, (ids,), (len(ids),))
    [prompt] = cluster.service.admission.word()
    cluster.say(request_id, len(ids), "a", attempt=2)
    cluster.service.abort(request_id)
    [after] = cluster.service.admission.word()
    assert (prompt.num_tokens > 0, after.num_tokens) == (True, 1)
    cluster.close()


# -- over HTTP ------------------------------------------------------------------------------------

NUM_TOKENS = 12
SAID = 5


async def post(
    address: str, last_id: str = "", events: int = 0, recalled: int | None = None, **more
) -> list[tuple[str, str]]:
    """The events of a stream: all, or the first so many before the client leaves. `recalled`: what
    the head must say of it."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    fields = {"model": MODEL, "prompt": [70, 71, 72], "max_tokens": NUM_TOKENS, "stream": True}
    body = json.dumps({**fields, **more}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n"
    head += f"Last-Event-ID: {last_id}\r\n" if last_id else ""
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + b"\r\n" + body)
        text = ""
        while piece := await reader.read(1 << 16):
            text += piece.decode()
            if events and text.count("\n\n") >= events:
                break
        status, _, rest = text.partition("\r\n\r\n")
        assert " 200 " in status.splitlines()[0]
        said = [one for one in status.splitlines() if one.startswith("x-recalled-tokens: ")]
        assert said == ([] if recalled is None else [f"x-recalled-tokens: {recalled}"])
        lines = [one for one in rest.splitlines() if one.startswith(("id: ", "data: "))]
        pairs = zip(lines[::2], lines[1::2], strict=True)
        return sse_blocks("\n\n".join(f"{name}\n{data}" for name, data in pairs))
    finally:
        writer.close()


def text_of(blocks: list[tuple[str, str]]) -> str:
    events = [json.loads(data) for _, data in blocks if data != "[DONE]"]
    assert not any("error" in one for one in events)
    return "".join(one["choices"][0]["text"] for one in events if one["choices"])


TRUE = tuple(map(drawn, range(SAID + 2)))


@pytest.mark.parametrize(
    ("held", "known"),
    [
        ((TRUE,), SAID),  # more than the client has
        ((TRUE[:SAID],), SAID),
        ((TRUE[: SAID - 1],), 0),
        (((9, *TRUE[1:]),), 0),
        ((), 0),
        (None, 0),  # of a version that knows no such question
    ],
)
def test_a_stream_goes_on_behind_what_an_instance_has(in_bench, monkeypatch, held, known):
    async def body(b):
        one = await b.instance("a", tokens_at_once=SAID)
        address = b.router.http_address
        first = await post(address, events=1)
        await until(lambda: one.cancels)
        name = one.admits[0].request_id
        one.held = None if held is None else {name: held}
        one.tokens_at_once = None
        rest = await post(address, first[-1][0], recalled=known)
        assert one.num_asked == 1
        assert len(one.admits[1].outputs[0] if one.admits[1].outputs else ()) == known
        assert one.admits[1].sampling.seed == one.admits[0].sampling.seed
        whole = await post(address, seed=5)
        assert text_of(first) + text_of(rest) == text_of(whole)
        assert len(text_of(first)) == SAID
        assert rest[-1][1] == "[DONE]"
        assert b.router.service.metrics.num_recalled == (known > 0)

    if held is None:
        monkeypatch.setattr(recall, "RECALL_S", 0.05)
    in_bench(body)


@pytest.mark.parametrize("scores", [{"logprobs": 1}, {"prompt": ["a", "b"]}])
def test_scores_and_several_prompts_are_drawn_again(in_bench, scores):
    async def body(b):
        one = await b.instance("a", tokens_at_once=SAID)
        address = b.router.http_address
        first = await post(address, events=1, **scores)
        await until(lambda: one.cancels)
        one.tokens_at_once = None
        one.held = {one.admits[0].request_id: (TRUE,)}
        await post(address, first[-1][0], recalled=0, **scores)
        assert one.num_asked == 0
        assert not one.admits[-1].outputs

    in_bench(body)
