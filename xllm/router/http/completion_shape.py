"""Plain completions as OpenAI writes them: chunks of a stream, and whole answers.

Pure: messages of the service in, JSON out. With echo each choice begins with its prompt; a
prompt that is only scored (echo, no new tokens) loses the token that the engine had to draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from xllm.protocol.generation import ChoiceResult, RequestFinished, TokenDelta, Usage
from xllm.router.http.event_ids import EventStage
from xllm.router.http.logprob_shape import legacy_logprobs
from xllm.router.http.shape import (
    ENCODER,
    Envelope,
    Events,
    event,
    usage_fields,
)
from xllm.router.http.streamed_shape import StreamedShape


@dataclasses.dataclass(frozen=True, slots=True)
class Echo:
    """What stands before the output of each prompt; the ids where logprobs were asked for."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...] = ()
    scoring: bool = False
    """No output at all: only the prompt with its logprobs."""


class CompletionShape(StreamedShape):
    """Writes the answer to one completion request; `num_choices` is its n."""

    def __init__(self, envelope: Envelope, num_choices: int, echo: Echo | None) -> None:
        super().__init__(envelope, "cmpl", "text_completion")
        self._num_choices = num_choices
        self._echo = echo
        self._offsets: dict[int, int] = {}

    def usage(self, usage: Usage) -> bytes:
        """See AnswerShape."""
        fields = self._fields(self._kind) | {
            "choices": [],
            "usage": usage_fields(self._counted(usage)),
        }
        return event(fields)

    def whole(self, results: Sequence[RequestFinished], usage: Usage) -> bytes:
        """See AnswerShape."""
        fields = self._fields(self._kind)
        fields["choices"] = [
            self._choice(result, choice) for result in results for choice in result.choices
        ]
        fields["usage"] = usage_fields(self._counted(usage))
        return ENCODER.encode(fields)

    @property
    def _scoring(self) -> bool:
        return self._echo is not None and self._echo.scoring

    def _counted(self, usage: Usage) -> Usage:
        return msgspec.structs.replace(usage, completion_tokens=0) if self._scoring else usage

    def _choice(self, result: RequestFinished, choice: ChoiceResult) -> dict[str, Any]:
        prompt = result.id
        text, logprobs = choice.text, choice.logprobs
        if self._scoring:
            text, logprobs = "", () if logprobs is not None else None
        shown: dict[str, Any] | None = None
        if self._echo is not None:
            text = self._echo.texts[prompt] + text
        if logprobs is not None:
            entries = list(result.prompt_logprobs or ())
            first = self._echo.ids[prompt][0] if self._echo and self._echo.ids[prompt] else None
            shown, _ = legacy_logprobs(
                [*entries, *logprobs], self._envelope.bytes_of, 0, first_id=first
            )
        return {
            "index": prompt * self._num_choices + choice.index,
            "text": text,
            "logprobs": shown,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _saying(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _ending(self) -> dict[str, Any]:
        return {"text": ""}

    def _opening(self, choice: int) -> Events:
        self._offsets[choice] = 0
        if self._echo is None:
            return []
        text = self._echo.texts[choice // self._num_choices]
        return [(EventStage.NOTHING, self._templates[choice].text(text))]

    def _say(self, choice: int, delta: TokenDelta) -> bytes | None:
        if self._scoring:
            return None
        if delta.logprobs:
            shown, self._offsets[choice] = legacy_logprobs(
                delta.logprobs, self._envelope.bytes_of, self._offsets[choice]
            )
            return event(self._chunk(choice, self._saying(delta.text), None, shown))
        return self._templates[choice].text(delta.text) if delta.text else None
