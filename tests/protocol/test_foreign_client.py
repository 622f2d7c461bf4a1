"""What docs/protocol.md promises to clients in other languages, by a MessagePack library that
knows nothing of this project."""

from __future__ import annotations

import msgpack
import pytest

from xllm.errors import BadMessageError
from xllm.protocol.client import ClientMessage
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.generation import ChoiceResult, RequestFinished, SubmitRequest, TokenDelta, Usage

DECODER: Decoder[ClientMessage] = Decoder(ClientMessage)


def test_a_plain_map_is_a_request() -> None:
    message = DECODER.decode(
        msgpack.packb(
            {
                "sampling": {"temperature": 0, "seed": 2**64 - 1, "logit_bias": {5: 1}},
                "prompt": [1, 2, 3],
                "id": 9,
                "type": "submit",
            }
        )
    )
    assert isinstance(message, SubmitRequest)
    assert message.prompt == (1, 2, 3)
    assert message.sampling.temperature == 0.0
    assert message.sampling.seed == 2**64 - 1
    assert message.sampling.logit_bias == {5: 1.0}
    assert message.stream


def test_unknown_entries_are_ignored() -> None:
    data = msgpack.packb({"type": "abort", "id": 1, "from_the_future": {"a": [1]}})
    assert DECODER.decode(data).id == 1


@pytest.mark.parametrize(
    "body",
    [
        {"id": 1},
        {"type": "abort"},
        {"type": "abort", "id": "1"},
        {"type": "no_such", "id": 1},
        {"type": "submit", "id": 1, "prompt": {"text": "Hi"}},
        {"type": "submit", "id": 1, "sampling": {"seed": 2**63, "n": 1.5}},
        ["abort", 1],
        "abort",
        None,
    ],
)
def test_what_is_no_request_is_refused(body: object) -> None:
    with pytest.raises(BadMessageError):
        DECODER.decode(msgpack.packb(body))


def test_an_extension_type_is_refused() -> None:
    data = msgpack.packb({"type": "abort", "id": msgpack.ExtType(4, b"payload")})
    with pytest.raises(BadMessageError):
        DECODER.decode(data)


def test_answers_are_plain_maps() -> None:
    delta = TokenDelta(id=3, token_ids=(7, 8), text="né", first_index=4)
    assert msgpack.unpackb(encode(delta)) == {
        "type": "delta",
        "id": 3,
        "first_index": 4,
        "token_ids": [7, 8],
        "text": "né",
    }
    finished = RequestFinished(
        id=3,
        request_id="0" * 32,
        choices=(ChoiceResult(index=0, finish_reason="stop"),),
        usage=Usage(prompt_tokens=2, completion_tokens=1),
    )
    assert msgpack.unpackb(encode(finished)) == {
        "type": "finished",
        "id": 3,
        "request_id": "0" * 32,
        "choices": [{"index": 0, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 1},
    }
