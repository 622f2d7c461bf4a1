"""What no message can hold is refused by the client library, with its place and its value."""

from __future__ import annotations

import numpy as np
import pytest

from tests.client.test_async_client import talk
from xllm.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ((1, 2**70), {}, "prompt[1]"),
        ((1,) * 100 + (2**70,), {}, "prompt[100]"),
        ("a", {"seed": 2**70}, "seed"),
        ("a", {"logit_bias": {5: 1.0, 2**70: 1.0}}, "logit_bias"),
        ("a", {"chat_template_kwargs": {"x": 2**70}}, "chat_template_kwargs.x"),
        ("a", {"stop_token_ids": [1, 2, 2**70]}, "stop_token_ids[2]"),
    ],
)
def test_a_number_that_cannot_be_sent_is_told_with_its_place(prompt, options, param):
    async def conversation(client, router):
        with pytest.raises(InvalidRequestError) as caught:
            await client.generate(prompt, **options)
        assert caught.value.param == param
        assert caught.value.message == f"{param} must fit 64 bits, not be a number of 71 bits"

    talk(conversation)


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (("a",), "token_ids[0] must be a whole number, not a string"),
        (5, "token_ids must be an array, not a whole number"),
        ((1, 2**70), "token_ids[1] must fit 64 bits, not be a number of 71 bits"),
    ],
)
def test_what_cannot_be_detokenized_is_refused_here(ids, told):
    async def conversation(client, router):
        with pytest.raises(InvalidRequestError) as caught:
            await client.detokenize(ids)
        assert caught.value.message == told

    talk(conversation)


@pytest.mark.parametrize("length", [1, 100])
def test_numbers_of_numpy_that_are_no_integers_are_no_ids(length):
    async def conversation(client, router):
        with pytest.raises(InvalidRequestError, match=r"a whole number|numpy"):
            await client.generate(np.full(length, 1.5))
        with pytest.raises(InvalidRequestError):
            await client.generate(np.ones((length, 2), dtype=int))
        assert router.submits == []

    talk(conversation)
