"""AsyncClient against a scripted router: results, errors, deadlines, aborts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from array import array

import numpy as np
import pytest
import uvloop

from tests.client.fake_router import FakeRouter
from xllm import AsyncClient
from xllm.errors import (
    BadMessageError,
    BrokenError,
    ClosedError,
    ContextLengthError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    PayloadTooLargeError,
    RequestAbortedError,
)
from xllm.protocol.generation import ChatMessage
from xllm.protocol.token_bytes import unpack_tokens


def talk(conversation, **options) -> None:
    """Run `conversation(client, router)` against a fresh router."""

    async def main() -> None:
        router = FakeRouter()
        try:
            async with AsyncClient(router.endpoint, **options) as client:
                await asyncio.wait_for(conversation(client, router), 20)
                client.connection.check()
        finally:
            router.close()

    asyncio.run(main())


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def free_endpoint() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_generate_gives_a_typed_result():
    async def conversation(client, router):
        done = await client.generate("echo a b", max_tokens=5, stop="!", temperature=0)
        assert (done.text, done.token_ids, done.finish_reason) == ("ab", (0, 1), "stop")
        assert done.choices[0].stop_reason == "!"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (1, 2)
        assert done.seed == 7
        assert done.timing.total_s > 0
        submit = router.submits[0]
        assert not submit.stream
        assert submit.sampling.max_tokens == 5
        assert submit.sampling.stop == ("!",)
        assert 0 < submit.timeout_ms <= 600_000

    talk(conversation)


@pytest.mark.parametrize("length", [1, 63, 64, 5000])
def test_many_token_ids_leave_as_bytes(length):
    async def conversation(client, router):
        ids = [number % 900 for number in range(length)]
        await client.generate(ids)
        await client.generate(array("I", ids))
        await client.generate(np.array(ids))
        assert len(router.submits) == 3
        for submit in router.submits:
            if length < 64:
                assert (submit.prompt, submit.packed_prompt) == (tuple(ids), b"")
            else:
                assert submit.prompt is None
                assert list(unpack_tokens(submit.packed_prompt)) == ids

    talk(conversation)


def test_chat_takes_mappings_and_structs():
    async def conversation(client, router):
        await client.chat([{"role": "user", "content": "echo a"}], model="m", priority=3)
        await client.chat([ChatMessage(role="user", content="echo a")])
        assert router.submits[0].messages == router.submits[1].messages
        assert (router.submits[0].model, router.submits[0].priority) == ("m", 3)

    talk(conversation)


def test_stream_gives_deltas_then_the_completion():
    async def conversation(client, router):
        stream = client.stream("echo a b c")
        texts = [delta.text async for delta in stream]
        assert texts == ["a", "b", "c"]
        done = stream.completion
        assert (done.text, done.token_ids) == ("abc", (0, 1, 2))
        assert 0 < done.timing.ttft_s <= done.timing.total_s
        assert [d async for d in stream] == []
        assert router.aborts == []

    talk(conversation)


def test_questions():
    async def conversation(client, router):
        assert [m.name for m in await client.models()] == ["m"]
        assert not (await client.health()).ready
        assert (await client.health(probe=True)).ready
        assert [p.name for p in await client.status()] == ["i0"]
        ids = await client.tokenize("ab")
        assert await client.detokenize(ids) == "ab"

    talk(conversation)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        ("context_length_exceeded", ContextLengthError),
        ("invalid_value", InvalidRequestError),
        ("overloaded", OverloadedError),
    ],
)
def test_failures_raise_their_class(code, cls):
    async def conversation(client, router):
        with pytest.raises(cls) as caught:
            await client.generate(f"fail {code}")
        assert caught.value.param == "p"
        with pytest.raises(cls):
            [d async for d in client.stream(f"fail {code}")]

    talk(conversation)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"max_token": 5}, "max_token", "unknown option max_token"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens must be a whole number, not a string"),
        ({"temperature": "hot"}, "temperature", "temperature must be a number, not a string"),
        ({"stop": 5}, "stop", "stop must be an array, not a whole number"),
        ({"priority": "x"}, "priority", "priority must be a whole number, not a string"),
        ({"timeout_s": -1}, "timeout_s", "timeout_s must be"),
        ({"timeout_s": "a"}, "timeout_s", "timeout_s must be a number of seconds"),
        ({"timeout_s": float("nan")}, "timeout_s", "timeout_s must be"),
    ],
)
def test_wrong_options_are_refused_here(options, param, words):
    async def conversation(client, router):
        with pytest.raises(InvalidRequestError) as caught:
            await client.generate("echo a", **options)
        assert caught.value.param == param
        assert words in str(caught.value)
        assert router.submits == []

    talk(conversation)


def test_prompt_or_messages():
    async def conversation(client, router):
        with pytest.raises(InvalidRequestError, match="one of them"):
            client.stream()
        with pytest.raises(InvalidRequestError, match="one of them"):
            client.stream("a", messages=[])

    talk(conversation)


@pytest.mark.parametrize("prompt", ["silent", "half"])
def test_time_over_aborts_at_the_router(prompt):
    async def conversation(client, router):
        with pytest.raises(DeadlineError):
            await client.generate(prompt, timeout_s=0.1)
        await until(lambda: router.aborts == [router.submits[0].id])
        with pytest.raises(DeadlineError):
            [d async for d in client.stream(prompt, timeout_s=0.1)]
        await until(lambda: len(router.aborts) == 2)

    talk(conversation)


def test_break_aborts():
    async def conversation(client, router):
        stream = client.stream("half")
        async for _ in stream:
            break
        await until(lambda: len(router.aborts) == 1)
        with pytest.raises(ClosedError):
            await stream.read()

    talk(conversation)


def test_leaving_the_block_aborts():
    async def conversation(client, router):
        async with client.stream("half"):
            await until(lambda: router.submits)
        await until(lambda: len(router.aborts) == 1)

    talk(conversation)


def test_cancelling_aborts():
    async def conversation(client, router):
        task = asyncio.create_task(client.generate("silent"))
        await until(lambda: router.submits)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: len(router.aborts) == 1)

    talk(conversation)


def test_abort_ends_with_the_routers_word():
    async def conversation(client, router):
        stream = client.stream("half")
        await stream.read()
        stream.abort()
        with pytest.raises(RequestAbortedError):
            await stream.read()

    talk(conversation)


def test_lost_and_repeated_tokens():
    async def conversation(client, router):
        with pytest.raises(BadMessageError, match="never came"):
            [d async for d in client.stream("gap")]
        assert len([d async for d in client.stream("twice")]) == 1

    talk(conversation)


def test_words_that_the_router_does_not_know():
    async def conversation(client, router):
        with pytest.raises(BadMessageError, match="as asked"):
            await client.generate("bad")

    talk(conversation)


def test_no_router():
    async def main() -> None:
        endpoint = free_endpoint()
        async with AsyncClient(endpoint, connect_timeout_s=0.2) as client:
            with pytest.raises(BrokenError, match=endpoint):
                await client.generate("echo a")

    asyncio.run(main())


def test_closing_fails_what_waits():
    async def conversation(client, router):
        task = asyncio.create_task(client.generate("silent"))
        await until(lambda: router.submits)
        await client.aclose()
        with pytest.raises(ClosedError):
            await task
        with pytest.raises(ClosedError):
            await client.generate("echo a")

    async def main() -> None:
        router = FakeRouter()
        await conversation(AsyncClient(router.endpoint), router)
        router.close()

    asyncio.run(main())


def test_many_at_once():
    async def conversation(client, router):
        done = await asyncio.gather(*(client.generate(f"echo {i}") for i in range(500)))
        assert [d.text for d in done] == [str(i) for i in range(500)]

    talk(conversation)


def test_answers_to_what_was_sent_before_the_connection():
    """Reproducer: what is sent as a connection comes up once swallowed the wake-up for answers."""

    async def main() -> None:
        router = FakeRouter()
        for _ in range(25):
            async with AsyncClient(router.endpoint, timeout_s=5) as client:
                done = await asyncio.gather(*(client.generate("echo a") for _ in range(64)))
                assert len(done) == 64
        router.close()

    uvloop.run(main())


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("a lone \ud800 surrogate", {}),
        ((1, 2**70), {}),
        ((1,) * 100 + (2**70,), {}),
        ((1.5,) * 100, {}),
        (("a",) * 100, {}),
        ("a", {"seed": 2**70}),
        ("a", {"stop": ("\udfff",)}),
        ("a", {"logit_bias": {2**70: 1.0}}),
        (5, {}),
    ],
)
def test_what_has_no_bytes_is_refused_and_leaves_nothing_open(prompt, options):
    async def conversation(client, router):
        with pytest.raises(InvalidRequestError):
            await client.generate(prompt, **options)
        assert client.connection.statistics().num_open == 0
        assert (await client.generate("echo a")).text == "a"

    talk(conversation)


def test_a_request_that_no_router_takes_is_not_sent():
    async def conversation(client, router):
        with pytest.raises(PayloadTooLargeError, match="1000"):
            await client.generate("x" * 1000)
        with pytest.raises(PayloadTooLargeError):
            client.stream("x" * 1000)
        assert client.connection.statistics().num_open == 0
        assert (await client.generate("echo a")).text == "a"
        assert len(router.submits) == 1

    talk(conversation, max_request_bytes=1000)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"abc", "prompt must be a text or token ids, not bytes"),
        ({1: 2}, "prompt must be a text or token ids, not dict"),
        (5, "prompt must be a text or token ids, not int"),
        ([1, "a"], "prompt[1] must be a whole number, not a string"),
        ([1] * 100 + ["a"], "prompt[100] must be a whole number, not a string"),
        ([1] * 100 + [None], "prompt[100] must be a whole number, not null"),
    ],
)
def test_what_is_no_prompt_is_refused_here(prompt, words):
    async def conversation(client, router):
        with pytest.raises(InvalidRequestError) as caught:
            await client.generate(prompt)
        assert words in str(caught.value)
        assert router.submits == []

    talk(conversation)


@pytest.mark.parametrize("endpoint", [5, None, [], ["tcp://127.0.0.1:8011", 5]])
def test_an_endpoint_is_an_address_or_several(endpoint):
    with pytest.raises(InvalidRequestError, match="endpoint must be an address, or several"):
        AsyncClient(endpoint)
