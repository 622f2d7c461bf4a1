"""Which session an HTTP request belongs to."""

from __future__ import annotations

import json

import msgspec
import pytest

from xllm.config.router import RouterSettings
from xllm.errors import InvalidRequestError
from xllm.router.http.convert import chat_request, check_completion, completion_requests
from xllm.router.http.schema import ChatBody, CompletionBody, decode_body
from xllm.router.http.sessions import session_of

CHAT = msgspec.json.Decoder(ChatBody)
COMPLETION = msgspec.json.Decoder(CompletionBody)


def chat(**fields) -> ChatBody:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return decode_body(CHAT, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("fields", "header", "users", "session"),
    [
        ({}, "", True, ""),
        ({}, "h", False, "h"),
        ({"metadata": {"session_id": "m"}}, "", False, "m"),
        ({"metadata": {"session_id": "m"}, "user": "u"}, "h", True, "h"),
        ({"metadata": {"other": 3}, "user": "u"}, "", True, "u"),
        ({"metadata": None, "user": "u"}, "", False, ""),
    ],
)
def test_the_header_comes_before_the_metadata_before_the_user(fields, header, users, session):
    assert session_of(chat(**fields), header, users) == session


@pytest.mark.parametrize(
    ("fields", "header", "param"),
    [
        ({}, "x" * 257, "x-session-id"),
        ({"metadata": {"session_id": "x" * 257}}, "", "metadata.session_id"),
        ({"metadata": {"session_id": 7}}, "", "metadata.session_id"),
        ({"user": "x" * 257}, "", "user"),
    ],
)
def test_what_names_no_session_is_refused(fields, header, param):
    with pytest.raises(InvalidRequestError) as caught:
        session_of(chat(**fields), header, True)
    assert caught.value.param == param


def test_a_session_reaches_the_request():
    settings = RouterSettings()
    assert chat_request(chat(), settings, "", "s").session == "s"
    body = decode_body(COMPLETION, b'{"model": "m", "prompt": ["a", "b"]}')
    prompts = check_completion(body, settings)
    requests = completion_requests(body, prompts, settings, "", "s")
    assert [one.session for one in requests] == ["s", "s"]
