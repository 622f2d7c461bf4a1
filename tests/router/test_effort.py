"""What is much work: every part of a request that can be long is seen."""

from __future__ import annotations

import pytest

from xllm.protocol.generation import ChatMessage, ContentPart, ResumePoint, SubmitRequest
from xllm.protocol.token_bytes import pack_tokens
from xllm.router.effort import LONG_IDS, LONG_TALK_MESSAGES, LONG_TEXT_CHARS, is_long_request

TEXT = "x" * (LONG_TEXT_CHARS + 1)
USER = ChatMessage(role="user", content="hi")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": TEXT},
        {"prompt": (1,) * (LONG_IDS + 1)},
        {"packed_prompt": pack_tokens((1,) * (LONG_IDS + 1))},
        {"messages": (USER,) * (LONG_TALK_MESSAGES + 1)},
        {"messages": (ChatMessage(role="user", content=TEXT),)},
        {"messages": (ChatMessage(role="user", content="", name=TEXT),)},
        {"messages": (ChatMessage(role="user", content=(ContentPart(type="text", text=TEXT),)),)},
        {"messages": (ChatMessage(role="user", content=(ContentPart(type="text"),) * 5000),)},
        {
            "prompt": "hi",
            "resume": ResumePoint(attempt=1, outputs=((1,) * LONG_IDS, (2,)), seed=1),
        },
    ],
)
def test_long(fields):
    assert is_long_request(SubmitRequest(id=1, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": TEXT[1:]},
        {"prompt": (1,) * LONG_IDS},
        {"packed_prompt": pack_tokens((1,) * LONG_IDS)},
        {"messages": (USER,) * LONG_TALK_MESSAGES},
        {"prompt": "hi", "resume": ResumePoint(attempt=1, outputs=((1,), (2,)), seed=1)},
        {},
    ],
)
def test_short(fields):
    assert not is_long_request(SubmitRequest(id=1, **fields))
