"""What is told of a body that is no JSON."""

import msgspec
import pytest

from xllm.errors import InvalidRequestError
from xllm.router.http.schema import decode_body


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"prompt": "a\\u0000\\ud800"}', "a surrogate in a string stands alone"),
        ('{"prompt":"\u00e9"}'.encode("latin-1"), "byte 11 is not UTF-8"),
        (b'{"prompt": "a', "Input data was truncated"),
        (b'{"a" 1}', "JSON is malformed: expected ':' (byte 5)"),
    ],
)
def test_what_is_wrong_with_the_json_is_told(body, told):
    with pytest.raises(InvalidRequestError) as caught:
        decode_body(msgspec.json.Decoder(dict), body)
    assert caught.value.message == f"the body is not valid JSON: {told}"
