"""Chat completions as OpenAI writes them: chunks of a stream, and whole answers.

Pure: messages of the service in, JSON out. Invariant: each choice's first event names the role
and its last one, and only that, the finish reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xllm.protocol.generation import ChoiceResult, RequestFinished, TokenDelta, Usage
from xllm.router.http.event_ids import EventStage
from xllm.router.http.logprob_shape import chat_logprobs
from xllm.router.http.shape import (
    ENCODER,
    Envelope,
    Events,
    event,
    usage_fields,
)
from xllm.router.http.streamed_shape import StreamedShape


class ChatShape(StreamedShape):
    """Writes one chat answer."""

    def __init__(self, envelope: Envelope) -> None:
        super().__init__(envelope, "chatcmpl", "chat.completion.chunk")

    def usage(self, usage: Usage) -> bytes:
        """See AnswerShape."""
        return event(self._fields(self._kind) | {"choices": [], "usage": usage_fields(usage)})

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

    def _saying(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _ending(self) -> dict[str, Any]:
        return {"delta": {}}

    def _opening(self, choice: int) -> Events:
        first = self._chunk(choice, {"delta": {"role": "assistant", "content": ""}})
        return [(EventStage.NOTHING, event(first))]

    def _say(self, choice: int, delta: TokenDelta) -> bytes | None:
        if delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs, self._envelope.bytes_of)
            return event(self._chunk(choice, self._saying(delta.text), None, logprobs))
        return self._templates[choice].text(delta.text) if delta.text else None
