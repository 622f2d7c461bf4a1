"""One answer of a request: its tokens as received, as said, and how it ended.

Invariant: `ids` are exactly the tokens that count, from index 0 without holes; the first
`num_sent` of them were given to the client.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from xllm.errors import InvariantError
from xllm.protocol.generation import ChoiceResult, TokenDelta
from xllm.protocol.sampling import TokenLogprobs
from xllm.router.state.spec import RequestSpec
from xllm.router.text.output import TextOutput


class ChoiceState(msgspec.Struct, eq=False, gc=False):
    """State of one choice. `matches` says whether its text can end it (stop strings): only then
    is text made as tokens come, else when they are sent."""

    index: int
    output: TextOutput
    matches: bool
    ids: list[int] = []
    num_sent: int = 0
    border: int = 0
    """A delta ends exactly behind so many tokens, once they are there; 0: it is passed."""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str = ""
    stop_reason: str | int | None = None
    told: bool = False
    """Whether a delta said how it ended."""
    _text: list[str] = []
    """Text made and not sent."""

    def resume(self, token_ids: Sequence[int], spec: RequestSpec) -> None:
        """Take over tokens of an earlier life; of a stream the client holds their text too."""
        sampling = spec.sampling
        stop_id = -1
        if len(token_ids) > sampling.min_tokens and token_ids[-1] in spec.stop_ids:
            stop_id = token_ids[-1]
        hidden = stop_id >= 0 and not sampling.include_stop_str_in_output
        self.take(token_ids, None, int(hidden))
        self._say()
        if stop_id >= 0:
            self.end("stop", stop_id if stop_id in sampling.stop_token_ids else None)
        elif len(token_ids) == sampling.max_tokens:
            self.end("length", None)
        if spec.stream:
            self._text.clear()
            self.num_sent = len(self.ids)

    def take(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        num_hidden: int = 0,
    ) -> bool:
        """New tokens, in order; the last `num_hidden` count but have no text (a stop id). True
        where they completed a stop string, which ends the choice."""
        self.ids += token_ids
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += logprobs
        if self.matches or num_hidden:
            self._say(num_hidden)
            if self.output.stop is not None:
                self._stop_at_string()
                return True
        return False

    def end(self, reason: str, stop_reason: int | None) -> None:
        """The engine ended it. A stop string that its last tokens completed came first."""
        if not self.finish_reason:
            self.finish_reason = reason
            self.stop_reason = stop_reason

    def delta(self, client_id: int, attempt: int) -> TokenDelta:
        """All that was not sent yet, as one message; it counts as sent."""
        first = self.num_sent
        ids = self.ids
        self._say()
        if self.finish_reason:
            self._text.append(self.output.finish())
            self.told = True
        text = "".join(self._text)
        self._text.clear()
        self.num_sent = len(ids)
        logprobs = None
        if self.logprobs is not None:
            logprobs = tuple(self.logprobs)
            self.logprobs = []
        return TokenDelta(
            id=client_id,
            choice=self.index,
            attempt=attempt,
            first_index=first,
            token_ids=tuple(ids[first:]),
            text=text,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
        )

    def result(self, stream: bool) -> ChoiceResult:
        """How it ended; all it said unless that was streamed."""
        if stream:
            return ChoiceResult(
                index=self.index, finish_reason=self.finish_reason, stop_reason=self.stop_reason
            )
        self._say()
        self._text.append(self.output.finish())
        return ChoiceResult(
            index=self.index,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            text="".join(self._text),
            token_ids=tuple(self.ids),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )

    def check(self) -> None:
        """InvariantError if the state cannot be."""
        if not 0 <= self.num_sent <= len(self.ids):
            raise InvariantError(f"choice {self.index}: {self.num_sent} of {len(self.ids)} sent")
        if self.output.num_tokens > len(self.ids):
            raise InvariantError(f"choice {self.index}: text of tokens that it does not have")
        self.output.check()

    def _say(self, num_hidden: int = 0) -> None:
        """Make text of the tokens that have none yet, save the last `num_hidden`."""
        output = self.output
        ids = self.ids
        start = output.num_tokens
        end = len(ids) - num_hidden
        if start < end:
            text = output.feed(ids[start:end] if start else (ids[:end] if num_hidden else ids))
            if text:
                self._text.append(text)
        if num_hidden and output.stop is None:
            output.count_hidden(num_hidden)

    def _stop_at_string(self) -> None:
        """Forget what came beyond the token that completed the stop string."""
        num_over = len(self.ids) - self.output.num_tokens
        if num_over:
            del self.ids[-num_over:]
            if self.logprobs is not None:
                del self.logprobs[-num_over:]
        self.finish_reason = "stop"
        self.stop_reason = self.output.stop
