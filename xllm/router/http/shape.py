"""What both kinds of answers share: the fields of an envelope and the usage of a request.

Pure: bytes and dictionaries, no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from xllm.protocol.generation import ChoiceResult, RequestFinished, TokenDelta, Usage
from xllm.router.http.event_ids import EventStage
from xllm.router.http.logprob_shape import BytesOf

ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"

Events = list[tuple[EventStage, bytes]]
"""Server-sent events of one choice, each with how far it takes the choice; a choice's first one,
which says nothing of its tokens, has EventStage.NOTHING."""


class Envelope(msgspec.Struct, frozen=True):
    """What stands in each chunk of an answer."""

    request_id: str
    created: int
    """Seconds since 1970."""
    model: str
    bytes_of: BytesOf
    include_usage: bool = False


class AnswerShape(Protocol):
    """How one kind of answer is written. Choices are numbered over all prompts."""

    def delta(self, choice: int, delta: TokenDelta) -> Events:
        """The events of one delta: its text and, if it is the last, how the choice ended."""
        ...

    def finish(self, choice: int, result: ChoiceResult) -> Events:
        """The last events of a choice whose deltas did not end it; none if they did."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The event that carries the usage."""
        ...

    def whole(self, results: Sequence[RequestFinished], usage: Usage) -> bytes:
        """The answer of a request that was not streamed."""
        ...


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + ENCODER.encode(value) + b"\n\n"


def usage_fields(usage: Usage) -> dict[str, Any]:
    """`usage` as OpenAI has it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def total_usage(usages: Sequence[Usage]) -> Usage:
    """The usage of several prompts as one."""
    if len(usages) == 1:
        return usages[0]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )


class EventTemplate:
    """The events of one choice, with all but the text encoded once."""

    __slots__ = ("_head", "_tail")

    def __init__(self, chunk: dict[str, Any], mark: str) -> None:
        encoded = event(chunk)
        head, found, tail = encoded.rpartition(ENCODER.encode(mark))
        assert found
        self._head = head
        self._tail = tail

    def text(self, text: str) -> bytes:
        """The event with this text."""
        return self._head + ENCODER.encode(text) + self._tail


MARK = "\u0001text\u0001"
"""Stands for the text in a template's chunk."""
