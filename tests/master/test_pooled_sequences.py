"""Vectors through the scheduler and the toy engine: whatever shares a step, whatever is cached,
cut, preempted or ended, a text has its own vector, once."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.toy_instance import ToyInstance
from xllm.errors import BadMessageError
from xllm.master.pooling import read_vectors
from xllm.master.routes import RequestRoutes
from xllm.protocol.step import StepResult
from xllm.worker.toy.faults import ToyFaults
from xllm.worker.toy.vectors import WIDTH, predict_vector

PROMPT = list(range(20, 33))


def make(pooling: str = "last", **limits) -> ToyInstance:
    return ToyInstance(task="embed", pooling=pooling, embedding_size=WIDTH, **limits)


def admit(one: ToyInstance, request_id: str, prompt, **options):
    return one.admit(request_id, prompt, embed=True, **{"max_tokens": 0, **options})


def verify(one: ToyInstance, request_id: str, attempt: int = 1) -> None:
    request = one.requests[request_id, attempt]
    want = predict_vector(request.prompt_ids, one.limits.pooling, one.limits.block_size)
    assert one.ended[request_id, attempt].code == ""
    assert one.vectors[request_id, attempt] == want
    stream = one.streams[request_id, attempt, 0]
    assert (stream.tokens, stream.reason) == ([], "length")


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("budget", [16, 2048])
def test_a_text_has_its_vector_however_it_is_cut(pooling, budget):
    one = make(pooling, max_num_batched_tokens=budget)
    prompts = {str(num): range(30, 30 + num) for num in (1, 3, 4, 5, 16, 17, 50, 64)}
    for name, prompt in prompts.items():
        assert admit(one, name, prompt) is None
    one.run()
    for name in prompts:
        verify(one, name)
    assert len(set(one.vectors.values())) == len(prompts)


def test_the_last_tokens_vector_uses_the_cache_and_computes_the_last_token():
    one = make("last")
    admit(one, "a", PROMPT[:12])
    one.run()
    admit(one, "b", PROMPT[:12])
    one.run()
    assert one.ended["b", 1].cached_tokens == 8
    assert one.plans[-1].items[0].num_tokens == 4
    verify(one, "a")
    verify(one, "b")


def test_a_mean_takes_no_row_from_the_cache_nor_waits_for_one():
    one = make("mean", share_prefixes=True, max_num_batched_tokens=16)
    long = list(range(20, 60))
    for name in "abc":
        admit(one, name, long)
    one.run()
    for name in "abc":
        verify(one, name)
        assert one.ended[name, 1].cached_tokens == 0
    computed = sum(item.num_tokens for plan in one.plans for item in plan.items)
    assert computed == 3 * len(long)


def test_texts_that_begin_alike_share_it_by_the_last_token():
    one = make("last", share_prefixes=True, max_num_batched_tokens=16)
    long = list(range(20, 60))
    for name in "abc":
        admit(one, name, long)
    one.run()
    for name in "abc":
        verify(one, name)
    computed = sum(item.num_tokens for plan in one.plans for item in plan.items)
    assert computed < 2 * len(long)


@pytest.mark.parametrize(
    ("limits", "options", "param"),
    [
        ({}, {"embed": False, "max_tokens": 4}, "model"),
        ({"task": "generate", "pooling": ""}, {}, "model"),
        ({}, {"max_tokens": 1}, "max_tokens"),
        ({}, {"n": 2}, "max_tokens"),
    ],
)
def test_what_the_model_is_not_served_for_is_refused(limits, options, param):
    one = ToyInstance(**{"task": "embed", "pooling": "last", "embedding_size": WIDTH, **limits})
    refusal = one.admit("a", PROMPT, **{"embed": True, "max_tokens": 0, **options})
    assert (refusal.code, refusal.param) == ("invalid_value", param)
    assert one.limits.task in refusal.message or param == "max_tokens"


def test_a_text_may_fill_the_whole_context():
    one = make(max_model_len=40)
    assert admit(one, "a", [21] * 40) is None
    assert "context is 40 tokens" in admit(one, "b", [21] * 41).message
    one.run()
    verify(one, "a")


def test_a_higher_attempt_has_the_vector_and_a_cancelled_one_has_none():
    one = make("mean", max_num_batched_tokens=16)
    admit(one, "a", range(20, 70))
    admit(one, "gone", range(20, 70))
    one.step()
    admit(one, "a", range(20, 70), attempt=2)
    one.scheduler.cancel("gone", 1)
    one.run()
    assert list(one.vectors) == [("a", 2)]
    verify(one, "a", 2)


@pytest.mark.parametrize("fault", ["fail_item", "fail_step"])
def test_a_failed_text_fails_alone_or_with_its_step(fault):
    one = make("mean", faults=ToyFaults(**{fault: 99}), max_num_seqs=2)
    for name, prompt in {"a": PROMPT, "bad": [20, 99, 21], "b": PROMPT}.items():
        admit(one, name, prompt)
    one.run()
    assert one.ended["bad", 1].code == "engine_error"
    assert ("bad", 1) not in one.vectors
    assert one.ended["a", 1].code == ("" if fault == "fail_item" else "engine_error")
    verify(one, "b")


@pytest.mark.parametrize("preemption", ["recompute", "pause"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_text_that_gave_way_is_made_whole(pooling, preemption):
    one = make(pooling, max_num_seqs=1, max_num_batched_tokens=16, preemption=preemption)
    admit(one, "offline", range(20, 80), offline=True)
    one.step()
    admit(one, "online", PROMPT)
    one.run()
    stats = one.scheduler.statistics()
    assert stats.num_preemptions + stats.num_pauses == 1
    assert list(one.ended) == [("online", 1), ("offline", 1)]
    verify(one, "offline")
    verify(one, "online")


@pytest.mark.parametrize(
    "change",
    [
        {"pooled": ()},
        {"pooled": (0, 1)},
        {"pooled": (1,)},
        {"expert_frames": 1},
    ],
)
def test_a_result_that_contradicts_its_plan_settles_nothing(change):
    one = make()
    admit(one, "a", PROMPT)
    plan = one.scheduler.schedule(one.now)
    output = one.toy.execute(plan)
    fields = {name: getattr(output.result, name) for name in output.result.__struct_fields__}
    wrong = StepResult(**{**fields, **change})
    with pytest.raises(BadMessageError, match=r"vector"):
        one.scheduler.update(wrong, output.frames, one.now)
    assert one.scheduler.statistics().num_steps_in_flight == 1
    one.take(one.scheduler.update(output.result, output.frames, one.now))
    verify(one, "a")


def test_vectors_stand_behind_logprobs_and_expert_counts():
    one = make()
    admit(one, "a", PROMPT)
    one.plan()
    step = one.scheduler._state.steps[1]
    ((_, output, _),) = one.in_flight
    fields = {name: getattr(output.result, name) for name in output.result.__struct_fields__}
    more = StepResult(**{**fields, "num_top": 0, "logprob_rows": (0,), "expert_frames": 2})
    frames = (b"", b"", b"", b"one", b"two", *output.frames)
    found = read_vectors(step, more, frames, None, WIDTH)
    assert found == {0: predict_vector(PROMPT, "last", 4)}


def test_each_router_gets_the_vectors_of_its_own_requests():
    one = make()
    routes = RequestRoutes()
    for name, router in {"a": b"r1", "b": b"r2"}.items():
        admit(one, name, PROMPT)
        routes.add(name, 1, router)
    one.plan()
    plan, output, _ = one.in_flight.popleft()
    assert len(plan.items) == 2
    outcome = one.scheduler.update(output.result, output.frames, one.now)
    batches = dict(routes.split(outcome))
    for name, router in {"a": b"r1", "b": b"r2"}.items():
        (word,) = batches[router].vectors
        assert (word.request_id, word.vector) == (name, predict_vector(PROMPT, "last", 4))


@dataclasses.dataclass(frozen=True)
class Event:
    kind: str
    which: int
    length: int
    offline: bool


EVENTS = st.lists(
    st.builds(
        Event,
        kind=st.sampled_from(["admit", "admit", "admit", "cancel", "again", "step"]),
        which=st.integers(0, 9),
        length=st.integers(1, 60),
        offline=st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    pooling=st.sampled_from(["last", "mean"]),
    max_in_flight=st.sampled_from([1, 2]),
    share=st.booleans(),
    num_blocks=st.sampled_from([16, 20, 64]),
    preemption=st.sampled_from(["auto", "recompute", "pause"]),
)
def test_random_histories(events, pooling, max_in_flight, share, num_blocks, preemption):
    """Few blocks and seats, beginnings in common, cancels, higher attempts."""
    one = make(
        pooling,
        max_in_flight=max_in_flight,
        share_prefixes=share,
        num_blocks=num_blocks,
        preemption=preemption,
        max_num_seqs=3,
        max_num_batched_tokens=16,
    )
    attempts: dict[str, int] = {}
    cancelled: set[tuple[str, int]] = set()
    for event in events:
        name = str(event.which)
        attempt = attempts.get(name, 0)
        if event.kind == "step":
            one.step()
        elif event.kind == "cancel" and attempt:
            if (name, attempt) not in one.ended:
                cancelled.add((name, attempt))
            one.scheduler.cancel(name, attempt)
        elif event.kind == "again" or not attempt:
            if attempt and (name, attempt) not in one.ended:
                cancelled.add((name, attempt))
            attempts[name] = attempt + 1
            prompt = [20 + event.which % 2] * (event.length // 2) + [30] * (event.length // 2 + 1)
            assert admit(one, name, prompt, attempt=attempt + 1, offline=event.offline) is None
        one.scheduler.check()
    one.run()
    for key in one.requests:
        if key in cancelled:
            assert key not in one.vectors
        else:
            verify(one, *key)
