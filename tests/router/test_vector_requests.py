"""Requests for vectors at the router: bounds, what the model is served for, moves, dimensions."""

from __future__ import annotations

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.fake_cluster import CONTEXT, WIDTH, FakeCluster, in_loop
from xllm.errors import InvalidRequestError
from xllm.protocol.generation import ChatMessage, RequestFailed, RequestFinished, ResumePoint
from xllm.protocol.instance import PooledVector, TokenBatch
from xllm.protocol.token_bytes import pack_tokens
from xllm.router.embedding import check_task, shorten

VECTOR = array("f", [0.6, 0.0, 0.0, 0.8]).tobytes()
OTHER = array("f", [0.0, 1.0, 0.0, 0.0]).tobytes()


@in_loop
async def test_a_vector_from_submit_to_finish():
    cluster = FakeCluster("a", task="embed")
    request_id, sink = cluster.ask("the quick brown fox", embed=True, stream=True, hold_ms=20)
    [admit] = cluster.links.admits()
    assert admit.embed
    assert (admit.sampling.max_tokens, admit.sampling.n) == (0, 1)
    assert admit.block_hashes
    cluster.pool(request_id, VECTOR)
    assert not sink.messages
    cluster.end(request_id, cached=2)
    (last,) = sink.messages
    assert isinstance(last, RequestFinished)
    assert (last.id, last.embedding, last.choices) == (7, VECTOR, ())
    usage = last.usage
    assert usage.prompt_tokens == len(admit.prompt_ids)
    assert (usage.completion_tokens, usage.cached_tokens) == (0, 2)
    assert not cluster.links.cancels()
    cluster.close()


@in_loop
async def test_a_vector_of_ids_that_come_as_bytes():
    cluster = FakeCluster("a", task="embed")
    packed = pack_tokens((5, 6, 7))
    request_id, sink = cluster.ask(None, embed=True, packed_prompt=packed)
    [admit] = cluster.links.admits()
    assert tuple(admit.prompt_ids) == (5, 6, 7)
    cluster.pool(request_id, VECTOR)
    cluster.end(request_id)
    assert (sink.last.embedding, sink.last.usage.prompt_tokens) == (VECTOR, 3)
    cluster.close()


@in_loop
async def test_an_end_without_the_vector_means_that_it_was_lost():
    cluster = FakeCluster("a", "b", task="embed")
    request_id, sink = cluster.ask("hello", embed=True)
    cluster.say(request_id, 0, "", "length")
    cluster.end(request_id)
    assert not sink.messages
    first, second = cluster.links.admits()
    assert (first.attempt, second.attempt) == (1, 2)
    cluster.pool(request_id, OTHER, attempt=1)
    cluster.pool(request_id, VECTOR, attempt=2)
    cluster.end(request_id, attempt=2)
    assert sink.last.embedding == VECTOR
    cluster.close()


@in_loop
async def test_another_instance_makes_it_when_the_first_dies():
    cluster = FakeCluster("a", "b", task="embed")
    request_id, sink = cluster.ask((5, 6, 7), embed=True)
    [(first, _)] = cluster.links.sent
    cluster.change(cluster.service.view.disconnected(first))
    second, admit = cluster.links.sent[-1]
    assert second != first
    assert (admit.attempt, admit.embed, admit.outputs) == (2, True, ())
    cluster.pool(request_id, VECTOR, attempt=2)
    cluster.end(request_id, attempt=2)
    assert sink.last.embedding == VECTOR
    cluster.close()


@in_loop
async def test_a_whole_answer_survives_the_instances_death():
    """Only the master's last word was missing."""
    cluster = FakeCluster("a", task="embed")
    request_id, sink = cluster.ask("hello", embed=True)
    cluster.pool(request_id, VECTOR)
    cluster.change(cluster.service.view.disconnected("a"))
    assert sink.last.embedding == VECTOR
    cluster.close()


@in_loop
async def test_an_abort_tells_the_instance():
    cluster = FakeCluster("a", task="embed")
    request_id, sink = cluster.ask("hello", embed=True)
    cluster.service.abort(request_id)
    assert sink.last.code == "aborted"
    [cancel] = cluster.links.cancels()
    assert cancel.request_id == request_id
    cluster.pool(request_id, VECTOR)
    cluster.close()


@in_loop
async def test_a_vector_that_nobody_asked_for_changes_nothing():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask("hello", max_tokens=4, stream=False)
    cluster.service.instance_says("a", TokenBatch(vectors=(PooledVector(request_id, 1, VECTOR),)))
    cluster.say(request_id, 0, "hey", "length")
    cluster.end(request_id)
    assert sink.last.embedding is None
    assert sink.last.choices[0].text == "hey"
    cluster.close()


@in_loop
async def test_a_text_may_fill_the_context():
    cluster = FakeCluster("a", task="embed")
    _, sink = cluster.ask((5,) * CONTEXT, embed=True)
    assert not sink.messages
    _, sink = cluster.ask((5,) * (CONTEXT + 1), embed=True)
    assert sink.last.code == "context_length_exceeded"
    assert sink.last.param == "prompt"
    _, sink = cluster.ask("~" * (CONTEXT + 1), embed=True)
    assert sink.last.code == "context_length_exceeded"
    assert sink.last.param == "prompt"
    cluster.close()


TALK = (ChatMessage("user", "hello"),)
RESUME = ResumePoint(attempt=1, outputs=((),), seed=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ()}, "prompt"),
        ({"prompt": (330,)}, "prompt[0]"),
        ({"prompt": (-1,)}, "prompt[0]"),
        ({"messages": TALK}, "messages"),
        ({"max_tokens": 3}, "sampling"),
        ({"n": 2}, "sampling"),
        ({"temperature": 0.0}, "sampling"),
        ({"resume": RESUME}, "resume"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": WIDTH + 1}, "dimensions"),
        ({"embed": False, "dimensions": 2}, "model"),
        ({"embed": False}, "model"),
    ],
)
@in_loop
async def test_what_makes_no_vector_is_refused_by_field(fields, param):
    cluster = FakeCluster("a", task="embed")
    _, sink = cluster.ask(**{"embed": True, **fields})
    failed = sink.last
    assert isinstance(failed, RequestFailed)
    assert (failed.code, failed.param) == ("invalid_value", param)
    assert not cluster.links.sent
    cluster.close()


@in_loop
async def test_dimensions_without_embed_are_refused():
    cluster = FakeCluster("a")
    _, sink = cluster.ask(dimensions=2)
    assert (sink.last.code, sink.last.param) == ("invalid_value", "dimensions")
    cluster.close()


@in_loop
async def test_each_refusal_names_what_the_model_is_for():
    cluster = FakeCluster("a", task="embed")
    _, sink = cluster.ask(messages=TALK)
    assert "served for task embed" in sink.last.message
    assert "/v1/embeddings" in sink.last.message
    [info] = cluster.service.models()
    assert (info.task, info.embedding_size) == ("embed", WIDTH)
    cluster.close()
    cluster = FakeCluster("a")
    _, sink = cluster.ask("hello", embed=True)
    assert "served for task generate" in sink.last.message
    assert cluster.service.models()[0].task == "generate"
    cluster.close()


def test_what_is_asked_must_be_what_is_served():
    from xllm.protocol.generation import SubmitRequest

    check_task(SubmitRequest(id=1, embed=True), "embed", "m")
    check_task(SubmitRequest(id=1), "generate", "m")
    with pytest.raises(InvalidRequestError):
        check_task(SubmitRequest(id=1, embed=True), "generate", "m")


@in_loop
async def test_dimensions_shorten_what_the_instance_gave():
    cluster = FakeCluster("a", task="embed")
    request_id, sink = cluster.ask("hello", embed=True, dimensions=2)
    cluster.pool(request_id, VECTOR)
    cluster.end(request_id)
    assert sink.last.embedding == array("f", [1.0, 0.0]).tobytes()
    cluster.close()


NUMBERS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40)


@given(numbers=NUMBERS, dimensions=st.integers(0, 50))
def test_a_shortened_vector_has_its_direction_and_length_one(numbers, dimensions):
    vector = array("f", numbers).tobytes()
    got = array("f", shorten(vector, dimensions))
    if not dimensions or dimensions >= len(numbers):
        assert got == array("f", numbers)
        return
    kept = numbers[:dimensions]
    assert len(got) == dimensions
    length = math.sqrt(math.fsum(x * x for x in kept))
    if not length:
        assert list(got) == kept
        return
    assert math.isclose(math.fsum(x * x for x in got), 1, rel_tol=1e-5)
    for mine, theirs in zip(got, kept, strict=True):
        assert math.isclose(mine * length, theirs, rel_tol=1e-5, abs_tol=1e-6 * length)
