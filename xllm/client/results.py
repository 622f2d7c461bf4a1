"""What a client gets: completions, deltas and their timing.

Counts and reasons are the router's; times are the client's own clock, from the call of `generate`
or `stream` on.
"""

from __future__ import annotations

import dataclasses
from array import array
from typing import NamedTuple

from xllm.protocol.generation import ChoiceResult, RequestFinished, TokenDelta, Usage
from xllm.protocol.sampling import TokenLogprobs


class StreamDelta(NamedTuple):
    """New text and tokens of one choice. `finish_reason` is "" while the choice goes on."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer. `stop_reason`: the stop string or stop id that ended it, if one did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Seconds as this client saw them. `ttft_s` is 0 where nothing was streamed."""

    ttft_s: float
    total_s: float
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        """Time for each token after the first; 0 for fewer than two tokens."""
        if self.num_tokens < 2 or not self.ttft_s:
            return 0.0
        return (self.total_s - self.ttft_s) / (self.num_tokens - 1)

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the whole time."""
        return self.num_tokens / self.total_s if self.total_s > 0 else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A request that ended as asked. `text` and `finish_reason` are those of the first choice.

    `seed` is the one that was used: the same request with it gives the same tokens."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    seed: int
    timing: Timing
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended: stop, length or abort."""
        return self.choices[0].finish_reason


@dataclasses.dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of one call, float32 and of length one each, in the order of its inputs (numpy
    takes them as they are); `usage` is that of all."""

    vectors: tuple[array[float], ...]
    usage: Usage


class AnswerBuilder:
    """Collects the deltas of one request into its Completion.

    Invariant: with no deltas the terminal message holds everything, else the deltas do."""

    __slots__ = ("_first_at", "_logprobs", "_started", "_texts", "_token_ids")

    def __init__(self, started: float) -> None:
        self._started = started
        self._first_at = 0.0
        self._texts: dict[int, list[str]] = {}
        self._token_ids: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[TokenLogprobs]] = {}

    def add(self, delta: TokenDelta, now: float) -> StreamDelta:
        """Take in one delta; returns it as the user sees it."""
        if not self._first_at and delta.token_ids:
            self._first_at = now
        choice = delta.choice
        self._texts.setdefault(choice, []).append(delta.text)
        self._token_ids.setdefault(choice, []).extend(delta.token_ids)
        if delta.logprobs is not None:
            self._logprobs.setdefault(choice, []).extend(delta.logprobs)
        return StreamDelta(choice, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)

    def finish(self, message: RequestFinished, now: float) -> Completion:
        """The Completion that this terminal message makes complete."""
        choices = tuple(self._choice(result) for result in message.choices)
        first = self._first_at - self._started if self._first_at else 0.0
        return Completion(
            request_id=message.request_id,
            choices=choices,
            usage=message.usage,
            seed=message.seed,
            timing=Timing(first, now - self._started, message.usage.completion_tokens),
            prompt_logprobs=message.prompt_logprobs,
        )

    def _choice(self, result: ChoiceResult) -> Choice:
        index = result.index
        streamed = index in self._token_ids
        logprobs = result.logprobs
        if streamed and index in self._logprobs:
            logprobs = tuple(self._logprobs[index])
        return Choice(
            index=index,
            text="".join(self._texts[index]) if streamed else result.text,
            token_ids=tuple(self._token_ids[index]) if streamed else result.token_ids,
            finish_reason=result.finish_reason,
            stop_reason=result.stop_reason,
            logprobs=logprobs,
        )
