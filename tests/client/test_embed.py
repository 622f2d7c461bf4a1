"""Vectors through the client library: one input or many, their order, errors, the window."""

from __future__ import annotations

import asyncio
from array import array

import pytest

from tests.client.fake_router import RouterThread
from tests.client.test_async_client import talk
from xllm import Client
from xllm.client.embedding import WINDOW, embed_all, split_inputs
from xllm.errors import (
    ContextLengthError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    RateLimitError,
)
from xllm.protocol.generation import RequestFinished, Usage


@pytest.mark.parametrize(
    ("inputs", "lengths"),
    [
        ("hello", [5]),
        ([4, 5, 6], [3]),
        (["a", "bcd"], [1, 3]),
        ([[1, 2], (3,)], [2, 1]),
        (["text", [1, 2]], [4, 2]),
    ],
)
def test_every_kind_of_input(inputs, lengths):
    async def conversation(client, router):
        got = await client.embed(inputs, model="m", priority=2, dimensions=7)
        assert [list(vector) for vector in got.vectors] == [[length, 7] for length in lengths]
        assert all(isinstance(vector, array) for vector in got.vectors)
        assert got.usage == Usage(sum(lengths), 0, len(lengths))
        for submit in router.submits:
            assert (submit.embed, submit.stream) == (True, False)
            assert (submit.model, submit.priority, submit.dimensions) == ("m", 2, 7)

    talk(conversation)


def test_many_inputs_keep_their_order():
    async def conversation(client, router):
        lengths = [1 + index % 9 for index in range(3 * WINDOW)]
        got = await client.embed(["x" * length for length in lengths])
        assert [vector[0] for vector in got.vectors] == lengths

    talk(conversation)


def test_an_error_names_the_input():
    async def conversation(client, router):
        with pytest.raises(ContextLengthError) as caught:
            await client.embed(["a", "fail context_length_exceeded prompt", "b"])
        assert caught.value.param == "inputs[1]"
        assert caught.value.message == "inputs[1]: as asked"
        with pytest.raises(InvalidRequestError) as refused:
            await client.embed(["a", "fail invalid_value dimensions"])
        assert (refused.value.param, refused.value.message) == ("dimensions", "as asked")
        with pytest.raises(ContextLengthError) as alone:
            await client.embed("fail context_length_exceeded prompt")
        assert (alone.value.param, alone.value.message) == ("inputs", "inputs: as asked")
        with pytest.raises(OverloadedError):
            await client.embed(["a", "fail overloaded prompt"])

    talk(conversation)


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ([], "inputs"),
        (5, "inputs"),
        (b"abc", "inputs"),
        (["a", ""], "inputs[1]"),
        ([[1], []], "inputs[1]"),
        (["a", 3], "inputs[1]"),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_sent(inputs, param):
    with pytest.raises(InvalidRequestError) as caught:
        split_inputs(inputs)
    assert caught.value.param == param


def test_sampling_options_are_unknown_here():
    async def conversation(client, router):
        for option in ("max_tokens", "stream", "embed", "resume"):
            with pytest.raises(InvalidRequestError) as caught:
                await client.embed("a", **{option: 1})
            assert caught.value.param == option
        with pytest.raises(InvalidRequestError):
            await client.generate("echo a", embed=True)
        with pytest.raises(InvalidRequestError):
            await client.generate("echo a", dimensions=3)

    talk(conversation)


def test_the_timeout_is_of_the_whole_call():
    async def conversation(client, router):
        router._embed = lambda submit: None  # never heard of again
        router._socket.send = lambda identity, reply: None
        with pytest.raises(DeadlineError):
            await client.embed(["a"] * (WINDOW + 1), timeout_s=0.2)

    talk(conversation)


def test_inputs_beyond_a_tenants_limit_come_back_when_told():
    async def main():
        num_open = num_refused = 0

        async def ask(prompt):
            nonlocal num_open, num_refused
            if num_open >= 2:
                num_refused += 1
                error = RateLimitError("2 are open")
                error.retry_after_s = 0.001
                raise error
            num_open += 1
            await asyncio.sleep(0)
            num_open -= 1
            return RequestFinished(1, "r", (), Usage(1, 0), embedding=b"")

        got = await embed_all(["a"] * 9, ask)
        assert len(got.vectors) == 9
        assert num_refused
        num_open = 2
        with pytest.raises(RateLimitError):
            await embed_all(["alone"], ask)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_failure_ends_the_others():
    async def main():
        started, cancelled = [], []

        async def ask(prompt):
            started.append(prompt)
            if prompt == "bad":
                raise InvalidRequestError("no", param="prompt")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(prompt)
                raise
            return RequestFinished(1, "r", (), Usage(1, 0))

        with pytest.raises(InvalidRequestError, match=r"inputs\[2\]: no"):
            await embed_all(["a", "b", "bad", "c"], ask)
        assert set(started) - set(cancelled) == {"bad"}

    asyncio.run(asyncio.wait_for(main(), 10))


def test_the_client_without_a_loop():
    with RouterThread() as router, Client(router.endpoint) as client:
        got = client.embed(["ab", "c"], dimensions=1)
        assert [list(vector) for vector in got.vectors] == [[2, 1], [1, 1]]
