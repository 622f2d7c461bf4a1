"""Bodies to requests: defaults, combinations and refusals, without a server."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config.router import RouterSettings
from xllm.errors import InvalidRequestError
from xllm.protocol.generation import ChatMessage, ContentPart
from xllm.protocol.native.token_ids import load
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import unpack_tokens
from xllm.router.http.completion_body import CompletionDecoder
from xllm.router.http.convert import (
    chat_request,
    check_completion,
    completion_requests,
    trace_of,
)
from xllm.router.http.schema import (
    REFUSED,
    ChatBody,
    CompletionBody,
    RefusedFields,
    decode_body,
)

SETTINGS = RouterSettings()
READERS = [CompletionDecoder(load()), CompletionDecoder(None)]
CHAT = msgspec.json.Decoder(ChatBody)
COMPLETION = msgspec.json.Decoder(CompletionBody)
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields):
    data = json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()
    return chat_request(decode_body(CHAT, data), SETTINGS, "")


def complete(**fields):
    data = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    body = CompletionDecoder(load()).decode(data)
    return completion_requests(body, check_completion(body, SETTINGS), SETTINGS, "")


def test_chat_defaults():
    request = chat()
    assert request.sampling == SamplingParams()
    assert request.messages == (ChatMessage(role="user", content="hi"),)
    assert not request.stream
    assert request.hold_ms == SETTINGS.hold_ms
    assert request.prompt is None


def test_every_field_arrives():
    fields = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "seed": 2**64 - 1,
        "n": 3,
        "stop_token_ids": [5],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    request = chat(
        **fields,
        stop=["a", "b"],
        logit_bias={"17": -100},
        logprobs=True,
        top_logprobs=3,
        priority=2,
        offline=True,
        cache_salt="s",
        ttft_ms=900,
        tpot_ms=80,
        stream=True,
        chat_template_kwargs={"enable_thinking": False},
    )
    for name, value in fields.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(request.sampling, name) == expected, name
    assert request.sampling.stop == ("a", "b")
    assert request.sampling.logit_bias == {17: -100.0}
    assert request.sampling.logprobs == 3
    assert (request.priority, request.offline, request.cache_salt) == (2, True, "s")
    assert (request.ttft_ms, request.tpot_ms) == (900, 80)
    assert request.stream
    assert request.chat_template_kwargs == {"enable_thinking": False}
    told = set(fields) | {"stop", "logit_bias", "logprobs", "prompt_logprobs"}
    assert told == set(SamplingParams.__struct_fields__)


def test_nulls_are_defaults():
    names = set(ChatBody.__struct_fields__) - {"model", "messages"}
    assert chat(**dict.fromkeys(names)) == chat()
    names = set(CompletionBody.__struct_fields__) - {"model", "prompt"}
    assert complete(**dict.fromkeys(names)) == complete()


def test_harmless_and_unknown_fields_are_ignored():
    fields = {
        "user": "u" * 100_000,
        "metadata": {"a": "b"},
        "store": True,
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "whatever": [1],
    }
    assert chat(**fields) == chat()


def test_refused_fields_are_the_struct():
    assert set(REFUSED) == set(RefusedFields.__struct_fields__)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields(name):
    for value in ({"x": 1}, "x", ["x"], 1):
        with pytest.raises(InvalidRequestError) as caught:
            chat(**{name: value})
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0]",
        ),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"temperature": "0.7"}, "temperature"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": [1]}, "stop[0]"),
        ({"n": True}, "n"),
    ],
)
def test_refused_chats(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": ["x", [1]]}, "prompt"),
        ({"prompt": [[1], 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [[["x"]]]}, "prompt[0][0]"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": ["x"] * 2, "n": 65}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"echo": True, "stream": True, "logprobs": 1}, "echo"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_refused_completions(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        complete(**fields)
    assert caught.value.param == param


def ids_of(requests):
    """However they travel: as bytes where the library read them."""
    return [list(one.prompt or unpack_tokens(one.packed_prompt)) for one in requests]


def test_prompts():
    assert [one.prompt for one in complete(prompt="x")] == ["x"]
    assert [one.prompt for one in complete(prompt=["x", "y"])] == ["x", "y"]
    assert ids_of(complete(prompt=[1, 2])) == [[1, 2]]
    assert [one.prompt for one in complete(prompt=[[1], [2, 3]])] == [(1,), (2, 3)]
    assert [one.id for one in complete(prompt=["x", "y"])] == [0, 1]
    assert complete(best_of=2, n=2)[0].sampling.n == 2
    assert complete(echo=True, logprobs=2)[0].sampling.prompt_logprobs == 2
    assert complete(echo=True, max_tokens=0)[0].sampling.max_tokens == 1
    assert complete(max_tokens=0)[0].sampling.max_tokens == 0


def test_content_parts_and_roles():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts, "name": "n"}])
    content = tuple(ContentPart(type="text", text=text) for text in "ab")
    assert request.messages == (ChatMessage(role="system", content=content, name="n"),)


def test_max_completion_tokens():
    assert chat(max_completion_tokens=9).sampling.max_tokens == 9
    assert chat(max_completion_tokens=9, max_tokens=9).sampling.max_tokens == 9


def test_traceparents():
    good = "00-" + "0a" * 16 + "-" + "0b" * 8 + "-01"
    assert trace_of(good.encode()) == good
    for bad in (good[:-1], good + "0", good.upper(), "", good + "\n"):
        assert trace_of(bad.encode()) == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"hello",
        b'{"model": "m"',
        b'\xef\xbb\xbf{"model": "m"}',
        '{"model": "m"}'.encode("utf-16"),
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "messages": [], "temperature": NaN}',
        b'{"model": "m", "messages": [], "temperature": Infinity}',
        b'{"model": "m", "messages": [], "temperature": 1e400}',
        b'{"model": "m", "messages": [], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "messages": [], "chat_template_kwargs": ' + b'{"a":' * 5000 + b"}",
    ],
)
def test_what_is_no_body(data):
    with pytest.raises(InvalidRequestError):
        decode_body(CHAT, data)


@pytest.mark.parametrize(
    ("more", "words", "param"),
    [
        ({"stream": "x"}, "stream must be true or false, not a string", "stream"),
        ({"n": 1.5}, "n must be a whole number, not a fraction", "n"),
        ({"temperature": True}, "temperature must be a number, not a boolean", "temperature"),
        ({"stop": 3}, "stop must be a string or an array, not a whole number", "stop"),
        ({"model": None}, "model must be a string, not null", "model"),
        ({"n": 2**64 - 1}, f"n must be at most {2**63 - 1}", "n"),
        ({"messages": [{"role": 1}]}, "messages[0].role must be a string, not a whole number",
         "messages[0].role"),
        ({"messages": [{}]}, "messages[0].role is missing", "messages[0]"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_said_in_plain_words(more, words, param):
    with pytest.raises(InvalidRequestError) as caught:
        decode_body(CHAT, json.dumps({"model": "m", "messages": [], **more}).encode())
    assert (caught.value.message, caught.value.param) == (words, param)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"[]", "the body must be an object, not an array"), (b"{}", "model is missing")],
)
def test_a_body_of_another_shape_is_said_in_plain_words(data, words):
    with pytest.raises(InvalidRequestError, match=words):
        decode_body(CHAT, data)


def test_of_a_key_that_stands_twice_the_last_holds():
    data = b'{"model": "a", "messages": [], "model": "b"}'
    assert decode_body(CHAT, data).model == "b"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1", max_size=3), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(ChatBody.__struct_fields__)), JSON_VALUES))
def test_any_chat_body_becomes_a_request_or_names_a_field(fields):
    try:
        request = chat(**fields)
    except InvalidRequestError as error:
        assert error.param or "JSON" in error.message  # noqa: PT017 - either outcome is right
    else:
        assert request.id == 0


@given(st.dictionaries(st.sampled_from(sorted(CompletionBody.__struct_fields__)), JSON_VALUES))
def test_any_completion_body_becomes_requests_or_names_a_field(fields):
    try:
        requests = complete(**fields)
    except InvalidRequestError as error:
        assert error.param or "JSON" in error.message  # noqa: PT017 - either outcome is right
    else:
        assert [request.id for request in requests] == list(range(len(requests)))


IDS = st.integers(-(2**70), 2**70)
ODD = st.one_of(IDS, st.text(max_size=9), st.floats(allow_nan=False), st.booleans(), st.none())
PROMPTS = st.one_of(
    st.text(max_size=30),
    st.lists(IDS, max_size=9),
    st.lists(st.one_of(ODD, st.lists(ODD, max_size=3)), max_size=5),
)


def outcome(decode, data):
    """The prompts that a decoder finds, or what it says of them."""
    try:
        body = decode(data)
        return body.model, [
            tuple(unpack_tokens(prompt)) if isinstance(prompt, bytes) else prompt
            for prompt in check_completion(body, SETTINGS)
        ]
    except InvalidRequestError as error:
        return error.message, error.param


@pytest.mark.skipif(load() is None, reason="it was not compiled here")
def test_the_library_reads_ids_here():
    data = b'{"metadata": {"a": 1}, "prompt": [ 1,\n22 , 4294967295 ], "model": "m"}'
    body = CompletionDecoder(load()).decode(data)
    (request,) = completion_requests(body, check_completion(body, SETTINGS), SETTINGS, "")
    assert list(unpack_tokens(request.packed_prompt)) == [1, 22, 4294967295]
    assert (request.prompt, request.model) == (None, "m")


@given(PROMPTS, st.sampled_from([None, (",", ":")]), st.booleans(), st.sampled_from([1, "1"]))
def test_lists_of_ids_are_read_as_any_prompt(prompt, separators, last, seed):
    fields = {"prompt": prompt, "model": 'the "prompt": [1]', "seed": seed}
    if last:
        fields = dict(reversed(fields.items()))
    data = json.dumps(fields, separators=separators).encode()
    expected = outcome(lambda data: decode_body(COMPLETION, data), data)
    assert [outcome(reader.decode, data) for reader in READERS] == [expected] * 2


@pytest.mark.parametrize(
    "data",
    [
        b'{"model": "m", "prompt": [01, 2]}',
        b'{"model": "m", "prompt": [1, 2,]}',
        b'{"model": "m", "prompt": [1 2]}',
        b'{"model": "m", "prompt": [1, 2.0]}',
        b'{"model": "m", "prompt": [1, 4294967296]}',
        b'{"model": "m", "prompt": [1, [2]]}',
        b'{"model": "m", "prompt": "", "metadata": {"prompt": [1]}}',
        b'{"metadata": {"prompt": [1]}, "model": "m", "prompt": [2]}',
        b'{"metadata": {"prompt": [1]}, "model": "m"}',
        b'{"model": "m", "prompt": [1], "prompt": [2]}',
        b'{"model": "m", "prompt": [1], "stop": "\\"prompt\\": [3]"}',
        b'{"model": "m", "prompt": [1, 2',
        b'{"model": "m", "prompt": [1, 2]',
        b'{"prompt": [1]}',
        b'{"model": "m", "prompt": [1\xff]}',
        b'{"model": "m", "prompt": [1], "stop": ' + b"[" * 5000,
        b'{"model": "m", "prompt": [1], "prompt": ["x"]}',
        b'{"model": "m", "prompt": ["x"], "prompt": [1]}',
    ],
)
def test_bodies_that_begin_with_ids_and_go_wrong(data):
    expected = outcome(lambda data: decode_body(COMPLETION, data), data)
    assert [outcome(reader.decode, data) for reader in READERS] == [expected] * 2
