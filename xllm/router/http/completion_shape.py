"""Plain completions as OpenAI writes them: chunks of a stream, and whole answers.

Pure: messages of the service in, JSON out. With echo each choice begins with its prompt; a
prompt that is only scored (echo, no new tokens) loses the token that the engine had to draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from xllm.protocol.client import ChoiceResult, RequestFinished, TokenDelta, Usage
from xllm.router.http.event_ids import EventStage
from xllm.router.http.logprob_shape import legacy_logprobs
from xllm.router.http.shape import (
    ENCODER,
    MARK,
    Envelope,
    Events,
    EventTemplate,
    event,
    usage_fields,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Echo:
    """What stands before the output of each prompt; the ids where logprobs were asked for."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...] = ()
    scoring: bool = False
    """No output at all: only the prompt with its logprobs."""


class CompletionShape:
    """Writes the answer to one completion request; `num_choices` is its n."""

    def __init__(self, envelope: Envelope, num_choices: int, echo: Echo | None) -> None:
        self._envelope = envelope
        self._num_choices = num_choices
        self._echo = echo
        self._templates: dict[int, EventTemplate] = {}
        self._offsets: dict[int, int] = {}
        self._ended: set[int] = set()

    def delta(self, choice: int, delta: TokenDelta) -> Events:
        """See AnswerShape."""
        template = self._templates.get(choice)
        events = []
        if template is None:
            events += self._begin(choice)
            template = self._templates[choice]
        said = EventStage.LAST_TEXT if delta.finish_reason else EventStage.SAID
        if not self._scoring:
            if delta.logprobs:
                shown, self._offsets[choice] = legacy_logprobs(
                    delta.logprobs, self._envelope.bytes_of, self._offsets[choice]
                )
                events.append((said, event(self._chunk(choice, delta.text, None, shown))))
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
                events += self._begin(choice)
            events.append((EventStage.ENDED, self._end(choice, result.finish_reason)))
        return events

    def usage(self, usage: Usage) -> bytes:
        """See AnswerShape."""
        fields = self._fields() | {"choices": [], "usage": usage_fields(self._counted(usage))}
        return event(fields)

    def whole(self, results: Sequence[RequestFinished], usage: Usage) -> bytes:
        """See AnswerShape."""
        fields = self._fields()
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

    def _begin(self, choice: int) -> Events:
        self._templates[choice] = EventTemplate(self._chunk(choice, MARK, None), MARK)
        self._offsets[choice] = 0
        if self._echo is None:
            return []
        text = self._echo.texts[choice // self._num_choices]
        return [(EventStage.NOTHING, self._templates[choice].text(text))]

    def _end(self, choice: int, reason: str) -> bytes:
        self._ended.add(choice)
        return event(self._chunk(choice, "", reason))

    def _chunk(
        self,
        choice: int,
        text: str,
        reason: str | None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        fields = self._fields()
        fields["choices"] = [
            {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}
        ]
        if self._envelope.include_usage:
            fields["usage"] = None
        return fields

    def _fields(self) -> dict[str, Any]:
        envelope = self._envelope
        return {
            "id": f"cmpl-{envelope.request_id}",
            "object": "text_completion",
            "created": envelope.created,
            "model": envelope.model,
        }
