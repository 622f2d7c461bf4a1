"""The official `openai` client against `xllm serve`: sync, async, streams, errors, fields.

The toy engine's streams are known, so that every text is compared, not only its shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib

import httpx
import openai
import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.served import Served
from xllm.protocol.generation import ChatMessage
from xllm.router.text.model import load_text_model

pytestmark = pytest.mark.process

MODEL = "toy-model"
PROMPT = [70, 71, 72]
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello wörld"}]


class Oracle:
    """What the service must say."""

    def __init__(self, path):
        self.path = path
        self.text_model = load_text_model(path)

    def ids(self, prompt, count, **sampling):
        return expected_ids(self.path, tuple(prompt), count, **sampling)

    def text(self, prompt, count, **sampling):
        return self.text_model.decode(self.ids(prompt, count, **sampling))

    def talk(self, messages):
        turns = tuple(ChatMessage(**message) for message in messages)
        rendered = self.text_model.render(turns, {})
        return self.text_model.encode(rendered, add_special_tokens=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / MODEL)


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xo').name}"
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("alice:alice-0123456789abcdef\nbob:bob-0123456789abcdef\n")
    keys.chmod(0o600)
    with Served(model, run_dir, "--api-key-file", str(keys)) as served:
        yield served
    with contextlib.suppress(OSError):
        pathlib.Path(run_dir).rmdir()


@pytest.fixture
def client(served):
    client = openai.OpenAI(
        base_url=served.http, api_key="alice-0123456789abcdef", max_retries=0, timeout=30
    )
    with client:
        yield client


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model


def test_chat(client, oracle):
    done = client.chat.completions.create(
        model=MODEL, messages=TALK, max_completion_tokens=20, seed=3
    )
    prompt = oracle.talk(TALK)
    (choice,) = done.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == oracle.text(prompt, 20, seed=3)
    assert choice.finish_reason == "length"
    assert done.usage.prompt_tokens == len(prompt)
    assert done.usage.completion_tokens == 20
    assert done.usage.total_tokens == len(prompt) + 20
    assert done.usage.prompt_tokens_details.cached_tokens >= 0
    assert done.object == "chat.completion"
    assert done._request_id in done.id


def test_chat_of_parts(client, oracle):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    done = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=5, temperature=0
    )
    prompt = oracle.talk([{"role": "user", "content": "hello"}])
    assert done.choices[0].message.content == oracle.text(prompt, 5, temperature=0.0)


def test_chat_stream(client, oracle):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=TALK,
        max_tokens=40,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    *parts, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    assert text == oracle.text(oracle.talk(TALK), 40, seed=3)
    assert [c.choices[0].finish_reason for c in parts if c.choices[0].finish_reason] == ["length"]
    assert last.choices == []
    assert last.usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_choices_differ_and_repeat(client, oracle):
    def ask():
        done = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, n=3, seed=5)
        return [choice.text for choice in done.choices]

    texts = ask()
    assert texts == [oracle.text(PROMPT, 8, seed=5, choice=choice) for choice in range(3)]
    assert len(set(texts)) == 3
    assert ask() == texts


def test_streamed_choices(client, oracle):
    texts = {}
    for chunk in client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=30, n=3, seed=5, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {one: oracle.text(PROMPT, 30, seed=5, choice=one) for one in range(3)}


def test_several_prompts(client, oracle):
    prompts = [[70], [71, 72], [73]]
    done = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, n=2, seed=1)
    assert [choice.index for choice in done.choices] == list(range(6))
    expected = [
        oracle.text(prompt, 4, seed=1, choice=choice) for prompt in prompts for choice in (0, 1)
    ]
    assert [choice.text for choice in done.choices] == expected
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 24)


def test_no_seed_means_another_answer(client):
    texts = {
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16).choices[0].text
        for _ in range(3)
    }
    assert len(texts) == 3


def test_stop(client, oracle):
    whole = oracle.text(PROMPT, 40, seed=5)
    stop = whole[10:13]
    expected = whole[: whole.index(stop)]
    for kind in (stop, [stop, "never seen in any answer"]):
        done = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=40, seed=5, stop=kind
        )
        assert done.choices[0].text == expected
        assert done.choices[0].finish_reason == "stop"
        assert done.choices[0].stop_reason == stop
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, seed=5, stop=stop, stream=True
    )
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == expected


def test_extra_fields(client, oracle):
    ids = oracle.ids(PROMPT, 20, seed=5)
    done = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=20,
        seed=5,
        user="someone",
        extra_body={"stop_token_ids": [ids[9]], "ignore_eos": True, "min_tokens": 1},
    )
    first = ids.index(ids[9])
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].text == oracle.text_model.decode(ids[:first])


def test_chat_logprobs(client, oracle):
    arguments = {
        "model": MODEL,
        "messages": TALK,
        "max_tokens": 6,
        "seed": 2,
        "logprobs": True,
        "top_logprobs": 3,
    }
    done = client.chat.completions.create(**arguments)
    entries = done.choices[0].logprobs.content
    assert len(entries) == 6
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode("utf-8", "replace") == done.choices[0].message.content
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    streamed = [
        entry
        for chunk in client.chat.completions.create(**arguments, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert streamed == entries


def test_plain_logprobs_and_echo(client, oracle):
    done = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, seed=2, logprobs=2, echo=True
    )
    (choice,) = done.choices
    shown = choice.logprobs
    prompt_text = oracle.text_model.decode(PROMPT)
    assert choice.text == prompt_text + oracle.text(PROMPT, 4, seed=2)
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.text_offset) == 7
    assert shown.token_logprobs[0] is None
    assert all(value <= 0 for value in shown.token_logprobs[1:])
    assert all(len(top) >= 2 for top in shown.top_logprobs[1:])
    scored = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=0, logprobs=2, echo=True
    )
    assert scored.choices[0].text == prompt_text
    assert scored.choices[0].logprobs.token_logprobs == shown.token_logprobs[:3]
    assert scored.usage.completion_tokens == 0


def test_leaving_a_stream_ends_it(client, oracle):
    with client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=500, seed=5, stream=True
    ) as stream:
        first = next(iter(stream))
    assert oracle.text(PROMPT, 500, seed=5).startswith(first.choices[0].text)
    done = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, seed=5)
    assert done.choices[0].text == oracle.text(PROMPT, 4, seed=5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"max_tokens": 10**7}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "response_format",
            "invalid_value",
        ),
    ],
)
def test_errors(client, fields, kind, param, code, stream):
    arguments = {"model": MODEL, "messages": TALK, "max_tokens": 4, "stream": stream} | fields
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**arguments)
    assert caught.value.param == param
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"


def test_a_wrong_key(served):
    wrong = openai.OpenAI(base_url=served.http, api_key="wrong-0123456789abcdef", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"


def test_tenants_share_no_cached_prefix(served, client):
    prompt = [75] * 200

    def cached(who, **extra):
        done = who.completions.create(
            model=MODEL, prompt=prompt, max_tokens=1, extra_body=extra or None
        )
        return done.usage.prompt_tokens_details.cached_tokens

    assert cached(client) == 0
    assert cached(client) > 100
    assert cached(client, cache_salt="other") == 0
    bob = openai.OpenAI(base_url=served.http, api_key="bob-0123456789abcdef", max_retries=0)
    with bob:
        assert cached(bob) == 0
        assert cached(bob) > 100


def test_raw_headers(client):
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=TALK, max_tokens=1
    )
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.parse().choices[0].message.content is not None


def test_many_at_once(served, oracle):
    """Async: 64 streams and whole answers together, each with its own seed."""

    async def scenario():
        async with openai.AsyncOpenAI(
            base_url=served.http, api_key="alice-0123456789abcdef", max_retries=0, timeout=60
        ) as client:

            async def whole(seed):
                done = await client.completions.create(
                    model=MODEL, prompt=PROMPT, max_tokens=30, seed=seed
                )
                return done.choices[0].text

            async def streamed(seed):
                text = ""
                stream = await client.completions.create(
                    model=MODEL, prompt=PROMPT, max_tokens=30, seed=seed, stream=True
                )
                async for chunk in stream:
                    text += "".join(choice.text for choice in chunk.choices)
                return text

            tasks = [one(seed) for seed in range(32) for one in (whole, streamed)]
            return await asyncio.gather(*tasks)

    texts = asyncio.run(scenario())
    for seed in range(32):
        expected = oracle.text(PROMPT, 30, seed=seed)
        assert texts[2 * seed] == texts[2 * seed + 1] == expected


def test_nothing_private_was_shown(served, client):
    secret = "a very private question"
    messages = [{"role": "user", "content": secret}]
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=10**7)
    metrics = httpx.get(
        served.http.removesuffix("/v1") + "/metrics",
        headers={"authorization": "Bearer alice-0123456789abcdef"},
    )
    assert "xllm_http_requests_total" in metrics.text
    for text in (served.text, metrics.text, *served.family().values()):
        assert secret not in text
        assert "0123456789abcdef" not in text
