"""Every bound of a request: what is just inside passes, what is just outside names its field."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.fake_cluster import CONTEXT, FakeCluster, in_loop
from xllm.config.router import RouterSettings
from xllm.errors import ContextLengthError, InvalidRequestError, RequestError
from xllm.protocol.generation import ChatMessage, ContentPart, ResumePoint, SubmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import pack_tokens
from xllm.router import validation
from xllm.router.front import Tenant
from xllm.router.model_facts import ModelFacts
from xllm.router.validation import check_context, check_request

LIMITS = RouterSettings(
    max_choices=4,
    max_logprobs=5,
    max_stop_strings=2,
    max_stop_chars=6,
    max_logit_bias=3,
    timeout_s=60,
)
FACTS = ModelFacts(max_model_len=100, vocab_size=50, longest_token_bytes=4)
NAN, INF = math.nan, math.inf


def check(sampling=None, **fields) -> None:
    if "messages" not in fields:
        fields.setdefault("prompt", "hello")
    request = SubmitRequest(id=1, sampling=SamplingParams(**(sampling or {})), **fields)
    check_request(request, LIMITS, FACTS)


def refused(param, sampling=None, kind=InvalidRequestError, **fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check(sampling, **fields)
    assert type(caught.value) is kind
    assert caught.value.param == param
    assert caught.value.http_status == 400
    return caught.value


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("temperature", [0.0, 2.0], [-0.01, 2.01, NAN, INF]),
        ("top_p", [0.001, 1.0], [0.0, -1.0, 1.01, NAN]),
        ("min_p", [0.0, 1.0], [-0.1, 1.1, NAN]),
        ("top_k", [-1, 0, 1, 10**9], [-2]),
        ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1, NAN, INF]),
        ("frequency_penalty", [-2.0, 2.0], [-2.1, 2.1, NAN, -INF]),
        ("repetition_penalty", [0.01, 10.0], [0.0, -1.0, 10.1, NAN, INF]),
        ("seed", [None, 0, 2**64 - 1], [-1, 2**64]),
        ("n", [1, 4], [0, -1, 5, 10**9]),
        ("max_tokens", [None, 1, 100], [0, -1]),
        ("min_tokens", [0, 100], [-1, 101]),
        ("logprobs", [None, 0, 5], [-1, 6, 154880]),
        ("prompt_logprobs", [None, 0, 5], [-1, 6, 154880]),
        ("logit_bias", [{}, {0: -100.0, 49: 100.0}], [
            {-1: 1.0}, {50: 1.0}, {1: 100.1}, {1: NAN}, {1: -INF}, dict.fromkeys(range(4), 0.0),
        ]),
        ("stop", [(), ("ab", "abcdef")], [("",), ("abcdefg",), ("a", "b", "c")]),
        ("stop_token_ids", [(), (0, 49)], [(0,) * 257]),
    ],
)  # fmt: skip
def test_sampling_bounds(name, inside, outside):
    for value in inside:
        check({name: value})
    for value in outside:
        refused(name, {name: value})


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("hold_ms", [0, 1000], [-1, 1001]),
        ("timeout_ms", [0, 60_000, 2**40], [-1]),
        ("priority", [-5, 5], [2**31, -(2**31)]),
        ("ttft_ms", [0, 3_600_000], [-1, 3_600_001]),
        ("tpot_ms", [0, 3_600_000], [-1, 3_600_001]),
        ("cache_salt", ["", "a" * 128, "A-z_0.9~+/="], ["a" * 129, "a b", "é", "a\n"]),
        ("traceparent", ["", "0" * 256], ["0" * 257]),
        ("prompt", [(0, 49), (1,) * 99, "a"], [(), "", "\ud800"]),
    ],
)
def test_request_bounds(name, inside, outside):
    for value in inside:
        check(**{name: value})
    for value in outside:
        refused(name, **{name: value})


def test_prompts_that_cannot_fit_are_refused_by_their_bytes():
    check(prompt="a" * 400)
    refused("prompt", kind=ContextLengthError, prompt="a" * 401)
    refused("prompt", kind=ContextLengthError, prompt="é" * 201)
    refused("prompt", kind=ContextLengthError, prompt=(1,) * 100)
    refused("max_tokens", {"max_tokens": 101}, ContextLengthError)


def test_exactly_one_of_prompt_and_messages():
    talk = (ChatMessage(role="user", content="x"),)
    refused("prompt", prompt=None)
    refused("prompt", prompt="x", messages=talk)
    refused("prompt", prompt="x", packed_prompt=pack_tokens((1,)))
    refused("prompt", prompt=None, messages=talk, packed_prompt=pack_tokens((1,)))
    check(messages=talk)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(50, "50"), (-1, "-1"), (2**63, "9223372036854775808"), (1 << 70, "a number of 71 bits")],
)
def test_a_foreign_id_is_told_with_its_place(wrong, told):
    bound = "must be an id from 0 to 49, not"
    for ids in ((wrong,), (1,) * 17 + (wrong, 1, 99)):
        place = f"[{len(ids) - 3 if len(ids) > 1 else 0}]"
        error = refused(f"prompt{place}", prompt=ids)
        assert error.message == f"prompt{place} {bound} {told}"
        error = refused(f"stop_token_ids{place}", {"stop_token_ids": ids})
        assert error.message == f"stop_token_ids{place} {bound} {told}"
    error = refused("logit_bias", {"logit_bias": {1: 1.0, wrong: 1.0}})
    assert error.message == f"logit_bias must have ids from 0 to 49 as keys, not {told}"
    error = refused("logit_bias", {"logit_bias": {1: 1.0, 7: 101.0}})
    assert error.message == "logit_bias must have values from -100 to 100, not 101.0 for 7"


@pytest.mark.parametrize("num_ids", [1, 99])
def test_packed_prompts(num_ids):
    check(prompt=None, packed_prompt=pack_tokens((49,) * num_ids))
    ids = (49,) * (num_ids - 1)
    for wrong in (50, 2**31, 2**32 - 1):
        place = f"prompt[{num_ids - 1}]"
        error = refused(place, prompt=None, packed_prompt=pack_tokens((*ids, wrong)))
        assert error.message == f"{place} must be an id from 0 to 49, not {wrong}"
    refused("packed_prompt", prompt=None, packed_prompt=pack_tokens((*ids, 1)) + b"\0")


def test_packed_prompts_that_do_not_fit():
    long = pack_tokens((1,) * 100)
    refused(
        "max_tokens",
        kind=ContextLengthError,
        prompt=None,
        packed_prompt=long[4:],
        sampling={"max_tokens": 101},
    )
    refused("prompt", kind=ContextLengthError, prompt=None, packed_prompt=long)
    refused("prompt", kind=ContextLengthError, prompt=None, packed_prompt=long * 1000)


def test_messages():
    def talk(**fields):
        return (ChatMessage(**{"role": "user", "content": "x", **fields}),)

    check(messages=talk(content=(ContentPart(type="text", text="x"),)))
    refused("messages", messages=())
    refused("messages", messages=talk() * 4097)
    refused("messages[0].role", messages=talk(role="wizard"))
    image = (ContentPart(type="image_url"),)
    refused("messages[0].content", messages=talk(content=image))
    refused("messages[0].content", kind=ContextLengthError, messages=talk(content="a" * 401))
    refused("messages", kind=ContextLengthError, messages=talk(content="a" * 300) * 2)
    refused("messages[0].name", kind=ContextLengthError, messages=talk(name="a" * 401))


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"tokenize": False}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template_kwargs"),
        ({"enable_thinking": "yes"}, "chat_template_kwargs.enable_thinking"),
        ({"add_generation_prompt": 1}, "chat_template_kwargs.add_generation_prompt"),
        ({"reasoning_effort": "x" * 65}, "chat_template_kwargs.reasoning_effort"),
        ({"x" * 10**6: 1}, "chat_template_kwargs"),
    ],
)
def test_template_switches_are_a_closed_list(kwargs, param):
    talk = (ChatMessage(role="user", content="x"),)
    check(messages=talk, chat_template_kwargs={"enable_thinking": False})
    refused(param, messages=talk, chat_template_kwargs=kwargs)


def test_resume_points():
    def at(attempt=1, outputs=((1, 2),), seed=5):
        return ResumePoint(attempt=attempt, outputs=outputs, seed=seed)

    check({"max_tokens": 2}, resume=at())
    refused("resume.attempt", resume=at(attempt=0))
    refused("resume.attempt", resume=at(attempt=2**31))
    refused("resume.seed", resume=at(seed=-1))
    refused("resume.outputs", resume=at(outputs=()))
    refused("resume.outputs", {"max_tokens": 1}, resume=at())
    refused("resume.outputs[0][1]", resume=at(outputs=((49, 50),)))


def test_context_with_its_numbers():
    assert check_context(60, None, 0, 100) == 40
    assert check_context(60, 40, 40, 100) == 40
    with pytest.raises(ContextLengthError, match=r"100 tokens.* 101: 60 .* 41") as caught:
        check_context(60, 41, 0, 100)
    assert caught.value.param == "max_tokens"
    with pytest.raises(ContextLengthError) as caught:
        check_context(100, None, 0, 100)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        check_context(60, None, 41, 100)


ANY_NUMBER = st.one_of(
    st.floats(), st.integers(-(2**63), 2**64 - 1), st.sampled_from([0, -1, 1, 2**31, 1e308])
)
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        **{name: ANY_NUMBER.map(float) for name in (
            "temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty")},
        **{name: st.integers(-3, 2**40) for name in (
            "n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")},
        "logit_bias": st.dictionaries(st.integers(-1, 400), st.floats(), max_size=4),
        "stop": st.lists(st.text(max_size=3), max_size=3).map(tuple),
        "stop_token_ids": st.lists(st.integers(-1, 400), max_size=3).map(tuple),
        "ignore_eos": st.booleans(),
    },
)  # fmt: skip


@given(
    SAMPLING,
    st.one_of(
        st.text(st.characters(exclude_categories=()), max_size=20),
        st.lists(st.integers(-1, 400), max_size=20).map(tuple),
    ),
)
def test_any_request_ends_or_is_admitted_within_bounds(sampling, prompt):
    @in_loop
    async def ask():
        cluster = FakeCluster("a")
        _, sink = cluster.ask(prompt, **sampling)
        admits = cluster.links.admits()
        if not admits:
            assert sink.last.code in ("invalid_value", "context_length_exceeded")
        else:
            [admit] = admits
            params = admit.sampling
            assert 1 <= params.max_tokens <= CONTEXT - len(admit.prompt_ids)
            assert 0 <= params.min_tokens <= params.max_tokens
            assert 0 <= params.temperature <= 2
            assert 1 <= params.n <= 128
            assert params.top_k >= 0
            assert all(0 <= token < 330 for token in admit.prompt_ids)
        cluster.close()

    ask()


@pytest.mark.parametrize("compiled", [True, False])
def test_ids_are_packed_once(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(validation, "load", lambda: None)
    cluster = FakeCluster("a")
    intake = cluster.service.served.first
    ids = (0, 17, 329)
    asked = SubmitRequest(id=1, prompt=ids)
    packed = intake.check(asked)
    assert packed == pack_tokens(ids)
    assert len(intake.check(SubmitRequest(id=1, prompt=ids * 101))) == 4 * 303
    made = [intake.prepare(asked, Tenant(), "r", 1, 1e9, one) for one in (packed, b"")]
    assert made[0] == made[1]
    assert intake.check(SubmitRequest(id=1, prompt="text")) == b""
    few, many = (1, 2), (1,) * (CONTEXT - 2)
    for start, last in itertools.product((few, many), (330, -1, 2**32, 1 << 80, -(1 << 40))):
        wrong = (*start, last)
        with pytest.raises(InvalidRequestError, match=rf"^prompt\[{len(start)}\].* from 0 to 329"):
            intake.check(SubmitRequest(id=1, prompt=wrong))


def test_parameters_that_passed_are_known_under_the_same_facts_only():
    cluster = FakeCluster("a")
    intake = cluster.service.served.first
    fine = SubmitRequest(id=1, prompt="hi", sampling=SamplingParams(stop_token_ids=(300,)))
    for _ in range(2):
        intake.check(fine)
        with pytest.raises(InvalidRequestError, match="temperature"):
            intake.check(SubmitRequest(id=1, prompt="hi", sampling=SamplingParams(temperature=3.0)))
        with pytest.raises(InvalidRequestError, match="hold_ms"):
            intake.check(msgspec.structs.replace(fine, hold_ms=-1))
        intake.check(fine)
    record = cluster.service.view.get("a").record
    intake.learn(msgspec.structs.replace(record, vocab_size=300))
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        intake.check(fine)
