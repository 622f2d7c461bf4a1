"""Chat completions as OpenAI writes them: chunks of a stream, and whole answers.

Pure: messages of the service in, JSON out. Invariant: each choice's first event names the role
and its last one, and only that, the finish reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xllm.protocol.client import ChoiceResult, RequestFinished, TokenDelta, Usage
from xllm.router.http.event_ids import EventStage
from xllm.router.http.logprob_shape import chat_logprobs
from xllm.router.http.shape import (
    ENCODER,
    MARK,
    Envelope,
    Events,
    EventTemplate,
    event,
    usage_fields,
)


class ChatShape:
    """Writes one chat answer."""

    def __init__(self, envelope: Envelope) -> None:
        self._envelope = envelope
        self._templates: dict[int, EventTemplate] = {}
        self._ended: set[int] = set()

    def delta(self, choice: int, delta: TokenDelta) -> Events:
        """See AnswerShape."""
        template = self._templates.get(choice)
        events = []
        if template is None:
            events.append((EventStage.NOTHING, self._begin(choice)))
            template = self._templates[choice]
        said = EventStage.LAST_TEXT if delta.finish_reason else EventStage.SAID
        if delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs, self._envelope.bytes_of)
            events.append((said, self._event(choice, {"content": delta.text}, None, logprobs)))
        elif delta.text:
            events.append((said, template.text(delta.text)))
        if delta.finish_reason:
            events.append((EventStage.ENDED, self._end(choice, delta.finish_reason)))
        return events

    def finish(self, choice: int, result: ChoiceResult) -> Events:
        """See AnswerShape."""
        events: Events = []
        if choice not in self._ended:
            if choice not in self._templates:
                events.append((EventStage.NOTHING, self._begin(choice)))
            events.append((EventStage.ENDED, self._end(choice, result.finish_reason)))
        return events

    def usage(self, usage: Usage) -> bytes:
        """See AnswerShape."""
        return event(self._fields() | {"choices": [], "usage": usage_fields(usage)})

    def whole(self, results: Sequence[RequestFinished], usage: Usage) -> bytes:
        """See AnswerShape."""
        fields = self._fields("chat.completion")
        fields["choices"] = [self._choice(choice) for choice in results[0].choices]
        fields["usage"] = usage_fields(usage)
        return ENCODER.encode(fields)

    def _choice(self, choice: ChoiceResult) -> dict[str, Any]:
        logprobs = None
        if choice.logprobs is not None:
            logprobs = chat_logprobs(choice.logprobs, self._envelope.bytes_of)
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _begin(self, choice: int) -> bytes:
        content = {"content": MARK}
        self._templates[choice] = EventTemplate(self._chunk(choice, content, None), MARK)
        return self._event(choice, {"role": "assistant", "content": ""}, None)

    def _end(self, choice: int, reason: str) -> bytes:
        self._ended.add(choice)
        return self._event(choice, {}, reason)

    def _event(
        self,
        choice: int,
        delta: dict[str, str],
        reason: str | None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        return event(self._chunk(choice, delta, reason, logprobs))

    def _chunk(
        self,
        choice: int,
        delta: dict[str, str],
        reason: str | None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        fields = self._fields()
        fields["choices"] = [
            {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        ]
        if self._envelope.include_usage:
            fields["usage"] = None
        return fields

    def _fields(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        envelope = self._envelope
        return {
            "id": f"chatcmpl-{envelope.request_id}",
            "object": kind,
            "created": envelope.created,
            "model": envelope.model,
        }
