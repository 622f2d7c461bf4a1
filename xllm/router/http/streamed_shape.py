"""What chats and completions do alike as streams: choices that begin, say texts, and end.

Pure. Invariant: a choice begins once, and ends once.
"""

from __future__ import annotations

import abc
from typing import Any

from xllm.protocol.generation import ChoiceResult, TokenDelta
from xllm.router.http.event_ids import EventStage
from xllm.router.http.shape import MARK, Envelope, Events, EventTemplate, event


class StreamedShape(abc.ABC):
    """Ids of its answers begin with `prefix`; `kind` is what its chunks call themselves."""

    def __init__(self, envelope: Envelope, prefix: str, kind: str) -> None:
        self._envelope = envelope
        self._prefix = prefix
        self._kind = kind
        self._templates: dict[int, EventTemplate] = {}
        """Of the choices that began."""
        self._ended: set[int] = set()

    def delta(self, choice: int, delta: TokenDelta) -> Events:
        """See AnswerShape."""
        events = [] if choice in self._templates else self._begin(choice)
        said = self._say(choice, delta)
        if said is not None:
            stage = EventStage.LAST_TEXT if delta.finish_reason else EventStage.SAID
            events.append((stage, said))
        if delta.finish_reason:
            events.append((EventStage.ENDED, self._end(choice, delta.finish_reason)))
        return events

    def finish(self, choice: int, result: ChoiceResult) -> Events:
        """See AnswerShape."""
        if choice in self._ended:
            return []
        events = [] if choice in self._templates else self._begin(choice)
        events.append((EventStage.ENDED, self._end(choice, result.finish_reason)))
        return events

    @abc.abstractmethod
    def _saying(self, text: str) -> dict[str, Any]:
        """The fields of a choice in a chunk that says a text."""

    @abc.abstractmethod
    def _opening(self, choice: int) -> Events:
        """What a choice begins with, before anything is said."""

    @abc.abstractmethod
    def _say(self, choice: int, delta: TokenDelta) -> bytes | None:
        """The event of a delta's text and logprobs; None where there is nothing to say."""

    @abc.abstractmethod
    def _ending(self) -> dict[str, Any]:
        """The fields of a choice in the chunk that ends it."""

    def _begin(self, choice: int) -> Events:
        self._templates[choice] = EventTemplate(self._chunk(choice, self._saying(MARK)), MARK)
        return self._opening(choice)

    def _end(self, choice: int, reason: str) -> bytes:
        self._ended.add(choice)
        return event(self._chunk(choice, self._ending(), reason))

    def _chunk(
        self,
        choice: int,
        says: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        fields = self._fields(self._kind)
        ends = {"logprobs": logprobs, "finish_reason": reason}
        fields["choices"] = [{"index": choice, **says, **ends}]
        if self._envelope.include_usage:
            fields["usage"] = None
        return fields

    def _fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self._prefix}-{self._envelope.request_id}",
            "object": kind,
            "created": self._envelope.created,
            "model": self._envelope.model,
        }
