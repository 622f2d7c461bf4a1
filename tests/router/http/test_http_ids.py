"""Token ids in bodies: as keys of logit_bias, and as what is to be detokenized."""

from __future__ import annotations

import json

import msgspec
import pytest

from tests.router.http.test_http_convert import chat
from xllm.errors import InvalidRequestError
from xllm.router.http.schema import CompletionBody, DetokenizeBody, decode_body

COMPLETION = msgspec.json.Decoder(CompletionBody)
DETOKENIZE = msgspec.json.Decoder(DetokenizeBody)


@pytest.mark.parametrize(
    "key", ["abc", "1.5", "", " 5", "5_0", "+5", "٥", "1.0", "1e2", "9" * 5000]
)
def test_a_key_of_logit_bias_that_is_no_id_is_told(key):
    with pytest.raises(InvalidRequestError) as caught:
        chat(logit_bias={"17": 1, key: 1})
    assert caught.value.param == "logit_bias"
    told = f"logit_bias must have token ids as keys, not {key[:24]!r}"
    assert caught.value.message == told
    assert chat(logit_bias={"-1": 1, "7": 2}).sampling.logit_bias == {-1: 1.0, 7: 2.0}


@pytest.mark.parametrize(
    "behind", ["}} x", "}, ", '}, "logit_bias": null}', '}, "logit_bias": {"1": 2}}']
)
def test_a_body_that_is_wrong_behind_such_a_key_is_refused(behind):
    body = f'{{"model": "m", "prompt": "a", "logit_bias": {{"a": 1{behind}'
    with pytest.raises(InvalidRequestError, match=r"^logit_bias must have token ids as keys$"):
        decode_body(COMPLETION, body.encode())


@pytest.mark.parametrize("number", [2**70, 2**63, -1])
def test_numbers_to_detokenize_are_the_services_to_judge(number):
    body = decode_body(DETOKENIZE, json.dumps({"tokens": [1, number]}).encode())
    assert body.tokens == [1, number]
