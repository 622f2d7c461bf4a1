"""What is told of a wrong value: its field, what it should be, what it is; no words of msgspec."""

from __future__ import annotations

import msgspec
import pytest

from xllm.errors import BadMessageError
from xllm.protocol.client import ClientMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.wrong_value import explain, renamed, shown


class Part(msgspec.Struct, frozen=True):
    bias: dict[int, float] = {}
    ids: tuple[int, ...] = ()


class Whole(msgspec.Struct):
    name: str
    part: Part = Part()
    parts: dict[str, Part] = {}


@pytest.mark.parametrize(
    ("value", "told", "param"),
    [
        (5, "the body must be an object, not a whole number", None),
        ({}, "name is missing", "name"),
        ({"name": 1.5}, "name must be a string, not a fraction", "name"),
        ({"name": "", "part": {"ids": [1, None]}}, "part.ids[1] must be a whole number, not null",
         "part.ids[1]"),
        ({"name": "", "part": {"bias": {"x": 1}}},
         "each key of part.bias must be a whole number, not a string", "part.bias"),
        ({"name": "", "part": {"bias": {5: "x"}}},
         "each value of part.bias must be a number, not a string", "part.bias"),
        ({"name": "", "parts": {5: {}}}, "each key of parts must be a string, not a whole number",
         "parts"),
        ({"name": "", "part": {"ids": [range(3)]}},
         "part.ids[0] must be a whole number, not range", "part.ids[0]"),
    ],
)  # fmt: skip
def test_the_place_what_is_wanted_and_what_was_given(value, told, param):
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, Whole)
    assert explain(str(caught.value), "the body") == (told, param)


def test_a_map_of_keys_at_the_top():
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"x": 1}, dict[int, int])
    assert (
        explain(str(caught.value), "it")[0] == "each key of it must be a whole number, not a string"
    )
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({1: "x"}, dict[int, int])
    assert (
        explain(str(caught.value), "it")[0]
        == "each value of it must be a whole number, not a string"
    )


@pytest.mark.parametrize(
    ("text", "told", "param"),
    [
        ('{"ids": [1, %s]}', "ids[1] must be a number of fewer digits", "ids[1]"),
        ('{"bias": {"%s": 1}}', "each key of bias must be a number of fewer digits", "bias"),
    ],
)
def test_more_digits_than_are_read(text, told, param):
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(text % ("9" * 5000), type=Part)
    assert explain(str(caught.value), "the body") == (told, param)


def test_frames_of_wrong_values_are_refused_in_the_same_words():
    decoder = Decoder(ClientMessage)
    for fields, told in (
        ({"token_ids": [1, "a"]}, "token_ids[1] must be a whole number, not a string"),
        ({"id": None}, "id must be a whole number, not null"),
    ):
        frame = msgspec.msgpack.encode({"type": "detokenize", "id": 1, **fields})
        with pytest.raises(BadMessageError) as caught:
            decoder.decode(frame)
        assert caught.value.message == f"no such message: {told}"


def test_a_field_by_another_name():
    bad = "prompt[17] must be an id from 0 to 9, not 10"
    assert renamed(bad, "prompt[17]", "prompt", "input[2]") == (
        "input[2][17] must be an id from 0 to 9, not 10",
        "input[2][17]",
    )
    assert renamed("it is long", "prompt", "prompt", "input") == ("input: it is long", "input")
    assert renamed("prompts must go", "prompts", "prompt", "input") is None
    assert renamed("no", None, "prompt", "input") is None


def test_numbers_are_told_within_bounds():
    assert shown(2**64 - 1) == "18446744073709551615"
    assert shown(-5) == "-5"
    assert shown(1 << 70) == "a number of 71 bits"
    assert shown(-(10**5000)) == "a number of 16610 bits"
