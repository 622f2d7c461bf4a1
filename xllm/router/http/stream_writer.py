"""A stream's messages as server-sent events, each with its id; and those that a client missed.

Pure: messages in, bytes out. Where a client was before (`LastEvent`), the same answer is drawn
again, and what was said of it is left out. Invariant: nothing is said of a choice behind that
place unless its tokens there have the hash that the place names; else the stream fails.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from xllm.errors import ConflictError
from xllm.protocol.client import RouterMessage
from xllm.protocol.generation import RequestFailed, RequestFinished, TokenDelta
from xllm.router.http.event_ids import (
    EventSigner,
    EventStage,
    LastEvent,
    Place,
    Stream,
    encode_place,
    token_digest,
)
from xllm.router.http.problem import Problem, problem_json, problem_of_failure
from xllm.router.http.shape import DONE, AnswerShape, Events, total_usage

NO_SPLICE = Problem(
    ConflictError(
        "The answer cannot be continued: drawn again, it differs from what was sent before "
        "Last-Event-ID. Ask anew without it."
    )
)


class StreamWriter:
    """Turns the messages of a stream into events; knows when it has ended.

    `num_choices`: of one prompt; `num_requests`: prompts. `last`: where the client is."""

    def __init__(
        self,
        shape: AnswerShape,
        signer: EventSigner,
        stream: Stream,
        num_choices: int,
        num_requests: int,
        *,
        include_usage: bool,
        last: LastEvent | None = None,
    ) -> None:
        total = num_choices * num_requests
        self._shape = shape
        self._signer = signer
        self._stream = stream
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._results: list[RequestFinished] = []
        self._tokens = [hashlib.sha256() for _ in range(total)]
        self._counts = [0] * total
        self._has_usage = last is not None and last.has_usage
        self._head = signer.head(stream, self._has_usage)
        places = last.places if last is not None else (Place(),) * total
        self._places = [place.encode() for place in places]
        self._behind = {choice: place for choice, place in enumerate(places) if any(place.order)}
        """Choices of which nothing was said that the client does not have."""
        self._proved = {one for one, place in self._behind.items() if not place.num_tokens}
        """Those of them whose tokens are there again, and are the same."""
        self.ended = False

    @property
    def is_behind(self) -> bool:
        """Whether something is still drawn again: then deltas must not be merged."""
        return len(self._behind) > len(self._proved)

    def events(self, messages: Sequence[RouterMessage]) -> bytes:
        """The events of these messages as one piece."""
        shape, num_choices = self._shape, self._num_choices
        parts: list[bytes] = []
        for message in messages:
            if type(message) is TokenDelta:
                choice = message.id * num_choices + message.choice
                self._delta(choice, message, parts)
            elif type(message) is RequestFinished:
                self._results.append(message)
                first = message.id * num_choices
                for one in message.choices:
                    self._finish(first + one.index, shape.finish(first + one.index, one), parts)
            elif type(message) is RequestFailed:
                parts.append(self.fail(problem_of_failure(message)))
            if self.ended:
                break
        return b"".join(parts)

    def end(self) -> bytes:
        """The events behind the last choice."""
        self.ended = True
        usage = b""
        if self._include_usage and not self._has_usage:
            self._head = self._signer.head(self._stream, True)
            usage = self._id() + self._shape.usage(
                total_usage([one.usage for one in self._results])
            )
        return usage + self._id() + DONE

    def fail(self, problem: Problem) -> bytes:
        """The event that ends a stream which cannot go on."""
        self.ended = True
        return self._id() + b"data: " + problem_json(problem) + b"\n\n"

    def _delta(self, choice: int, delta: TokenDelta, parts: list[bytes]) -> None:
        events = self._shape.delta(choice, delta)
        if delta.token_ids:
            if events and not self._counts[choice] and events[0][0] is EventStage.NOTHING:
                self._say(choice, events[:1], parts)
                events = events[1:]
            self._tokens[choice].update(array("I", delta.token_ids))
            self._counts[choice] += len(delta.token_ids)
        if choice in self._behind and not self._is_true(choice):
            self._refuse(parts)
            return
        self._say(choice, events, parts)

    def _finish(self, choice: int, events: Events, parts: list[bytes]) -> None:
        place = self._behind.get(choice)
        if place is not None and self._counts[choice] != place.num_tokens:
            self._refuse(parts)
        elif not self.ended:
            self._say(choice, events, parts)

    def _is_true(self, choice: int) -> bool:
        """Whether the tokens drawn again so far can be those that were said."""
        place = self._behind[choice]
        count = self._counts[choice]
        if count > place.num_tokens:
            return choice in self._proved and place.stage <= EventStage.SAID
        if count and count == place.num_tokens:
            if token_digest(self._tokens[choice]) != place.digest:
                return False
            self._proved.add(choice)
        return True

    def _say(self, choice: int, events: Events, parts: list[bytes]) -> None:
        count = self._counts[choice]
        for stage, event in events:
            # A choice's first event says nothing of its tokens, but that it has begun.
            reached = EventStage.SAID if stage is EventStage.NOTHING else stage
            place = self._behind.get(choice)
            if place is not None:
                is_old = (count, reached) <= place.order
                if not is_old or reached is EventStage.ENDED:
                    del self._behind[choice]
                    self._proved.discard(choice)
                if is_old:
                    continue
            digest = token_digest(self._tokens[choice]) if count else b""
            self._places[choice] = encode_place(count, reached, digest)
            parts += (self._id(), event)

    def _refuse(self, parts: list[bytes]) -> None:
        parts.append(self.fail(NO_SPLICE))

    def _id(self) -> bytes:
        return b"id: " + self._signer.sign(self._head + b"".join(self._places)) + b"\n"
