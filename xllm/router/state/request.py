"""The life of one request: events in, instructions out.

It knows its tokens, its attempt and the name of the instance that runs it; it does not know
sockets, clocks, sinks or how an instance is chosen. Invariants: exactly one terminal message, and
nothing after it; each choice's tokens reach the client from index 0 on, once each, in order,
whatever instances and attempts they came from. Words of a replaced attempt, and tokens that are
here already, are dropped by (attempt, first_index).
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.errors import (
    DeadlineError,
    EngineError,
    InvariantError,
    OverloadedError,
    UnavailableError,
)
from xllm.protocol.client import ResumePoint
from xllm.protocol.instance import CancelRequest, PromptScores, RequestEnded, TokenItem
from xllm.protocol.sampling import TokenLogprobs
from xllm.router.state.choice import ChoiceState
from xllm.router.state.endings import failed, finished
from xllm.router.state.instructions import Instruction, SendTo, Wish
from xllm.router.state.spec import RequestSpec
from xllm.router.text.output import TextOutput

MAX_MOVES = 5
"""Attempts beyond the first before a request is given up."""
PATIENCE_S = 30.0
"""How long a request that lost its instance waits for another."""
_NOTHING: tuple[Instruction, ...] = ()
_FLUSH: tuple[Instruction, ...] = (Wish.FLUSH,)
_MOVABLE = frozenset((UnavailableError.code, OverloadedError.code))
"""Refusals of a master after which another may serve the request."""


class RequestLife:
    """One request, from its submission to its terminal message."""

    __slots__ = (
        "_flush_wished",
        "_homeless_since",
        "_last_refusal",
        "_prompt_scores",
        "attempt",
        "avoid",
        "cached_tokens",
        "choices",
        "ended",
        "hold_s",
        "instance",
        "num_dropped",
        "num_moves",
        "spec",
    )

    def __init__(self, spec: RequestSpec, outputs: Sequence[TextOutput]) -> None:
        matches = bool(spec.sampling.stop)
        self.spec = spec
        self.choices = [ChoiceState(k, output, matches) for k, output in enumerate(outputs)]
        self.attempt = 1
        self.instance = ""
        """Where the present attempt runs; empty: nowhere yet."""
        self.avoid: frozenset[str] = frozenset()
        """Instances that refused it."""
        self.ended = False
        self.hold_s = spec.hold_s
        """How long tokens are held at present; longer than asked while the client reads slowly."""
        self.cached_tokens = 0
        self.num_moves = 0
        self.num_dropped = 0
        self._flush_wished = False
        self._homeless_since = 0.0
        self._last_refusal = ""
        self._prompt_scores: list[TokenLogprobs | None] | None = None
        if spec.sampling.prompt_logprobs is not None:
            self._prompt_scores = [None] * len(spec.prompt_ids)

    # -- starting and moving -----------------------------------------------------------------

    def resume(self, point: ResumePoint) -> Sequence[Instruction]:
        """Before `place`: take over what the client already holds. The answer may be complete:
        then this ends the request."""
        self.attempt = point.attempt + 1
        for choice, ids in zip(self.choices, point.outputs, strict=True):
            if ids:
                choice.resume(ids, self.spec)
        if self._all_finished():
            return self._finish()
        return (*self._deltas(), Wish.PLACE)

    def place(self, stages: tuple[tuple[str, str], ...], now: float) -> Sequence[Instruction]:
        """Run on that route, under the present attempt."""
        if self.ended or self.instance:
            return _NOTHING
        self.instance = stages[0][1]
        choices = self.choices
        outputs: tuple[tuple[int, ...], ...] = ()
        if self.attempt > 1 and any(choice.ids for choice in choices):
            outputs = tuple(tuple(choice.ids) for choice in choices)
        admit = self.spec.admit(self.attempt, stages, outputs, now)
        if not outputs:
            return (SendTo(self.instance, admit),)
        return (
            SendTo(self.instance, admit),
            *(self._cancel_choice(choice) for choice in choices if choice.finish_reason),
        )

    def unplaceable(self, now: float) -> Sequence[Instruction]:
        """There is no instance for it now: fail, or wait for one if it had one before."""
        if self.ended:
            return _NOTHING
        if self._last_refusal == OverloadedError.code:
            return self._fail(OverloadedError.code, "every instance's queue is full", 1000)
        if self.num_moves == 0:
            return self._fail(UnavailableError.code, "no instance is ready", 1000)
        if not self._homeless_since:
            self._homeless_since = now
        if now - self._homeless_since > PATIENCE_S:
            return self._fail(UnavailableError.code, "its instance was lost and none came", 1000)
        self.avoid = frozenset()
        return _NOTHING

    def instance_lost(self, instance: str) -> Sequence[Instruction]:
        """That instance is gone or suspect: go on elsewhere from the tokens received."""
        if self.ended or self.instance != instance:
            return _NOTHING
        return self._move()

    # -- words of the instance ---------------------------------------------------------------

    def tokens(self, item: TokenItem) -> Sequence[Instruction]:
        """New tokens of one choice."""
        number = item.choice
        choices = self.choices
        if item.attempt != self.attempt or self.ended or not 0 <= number < len(choices):
            self.num_dropped += 1
            return _NOTHING
        choice = choices[number]
        if choice.finish_reason:
            return _NOTHING
        new = item.token_ids
        logprobs = item.logprobs
        have = len(choice.ids)
        if item.first_index != have:
            if item.first_index > have:
                return self._move()  # tokens were lost on the way
            self.num_dropped += 1
            new = new[have - item.first_index :]
            if logprobs is not None:
                logprobs = logprobs[have - item.first_index :]
            if not new and not item.finish_reason:
                return _NOTHING
        if item.finish_reason:
            return self._last_tokens(choice, new, logprobs, item)
        if choice.take(new, logprobs):  # a stop string, of which the engine does not know
            return self._choice_ended(choice, (self._cancel_choice(choice),))
        spec = self.spec
        if not spec.stream:
            return _NOTHING
        if not choice.num_sent or not self.hold_s:
            return (choice.delta(spec.client_id, self.attempt),)
        if self._flush_wished:
            return _NOTHING
        self._flush_wished = True
        return _FLUSH

    def prompt_scores(self, scores: PromptScores) -> Sequence[Instruction]:
        """Logprobs of a piece of the prompt."""
        known = self._prompt_scores
        if scores.attempt != self.attempt or known is None:
            self.num_dropped += 1
            return _NOTHING
        first = scores.first_position
        if first >= 0 and first + len(scores.logprobs) <= len(known):
            known[first : first + len(scores.logprobs)] = scores.logprobs
        return _NOTHING

    def engine_ended(self, word: RequestEnded) -> Sequence[Instruction]:
        """The master's one terminal word on an attempt."""
        if word.attempt != self.attempt or self.ended:
            self.num_dropped += 1
            return _NOTHING
        if not word.code:
            self.cached_tokens = word.cached_tokens
            # An end without all tokens means that some were lost on the way.
            return self._finish() if self._all_finished() else self._move()
        if word.code in _MOVABLE:
            self._last_refusal = word.code
            self.avoid |= {self.instance}
            return self._move(told=True)
        return self._fail(word.code, word.message, param=word.param or None, told=True)

    # -- words of the service ----------------------------------------------------------------

    def flush(self) -> Sequence[Instruction]:
        """The hold time has passed: say what is held."""
        self._flush_wished = False
        return () if self.ended else self._deltas()

    def cancel(self, code: str, message: str) -> Sequence[Instruction]:
        """The client, or the end of the process, stops it."""
        return _NOTHING if self.ended else self._fail(code, message)

    def expire(self, now: float) -> Sequence[Instruction]:
        """The deadline may have passed."""
        if self.ended or now < self.spec.deadline:
            return _NOTHING
        return self._fail(DeadlineError.code, "the request's time is over")

    # -- the ends ----------------------------------------------------------------------------

    def _last_tokens(
        self,
        choice: ChoiceState,
        new: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
        item: TokenItem,
    ) -> Sequence[Instruction]:
        stop_id = item.stop_id
        sampling = self.spec.sampling
        hidden = bool(new) and new[-1] == stop_id and not sampling.include_stop_str_in_output
        choice.take(new, logprobs, int(hidden))
        choice.end(item.finish_reason, stop_id if stop_id in sampling.stop_token_ids else None)
        return self._choice_ended(choice)

    def _choice_ended(
        self, choice: ChoiceState, said: tuple[Instruction, ...] = ()
    ) -> Sequence[Instruction]:
        """After the last choice's end RequestEnded follows, with what only the master knows."""
        if not self.spec.stream:
            return said
        return (*said, choice.delta(self.spec.client_id, self.attempt))

    def _cancel_choice(self, choice: ChoiceState) -> SendTo:
        word = CancelRequest(self.spec.request_id, self.attempt, choice.index)
        return SendTo(self.instance, word)

    def _all_finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def _deltas(self) -> list[Instruction]:
        """All that was not said yet."""
        if not self.spec.stream:
            return []
        client_id, attempt = self.spec.client_id, self.attempt
        return [
            choice.delta(client_id, attempt)
            for choice in self.choices
            if choice.num_sent < len(choice.ids) or (choice.finish_reason and not choice.told)
        ]

    def _finish(self) -> list[Instruction]:
        self.ended = True
        spec = self.spec
        said = self._deltas()
        said.append(finished(spec, self.choices, self.cached_tokens, self._prompt_scores))
        return said

    def _fail(
        self,
        code: str,
        message: str,
        retry_after_ms: int = 0,
        *,
        param: str | None = None,
        told: bool = False,
    ) -> list[Instruction]:
        """`told`: the instance knows already that it is over. What has all its choices is no
        failure: only the master's last word was missing."""
        if self._all_finished():
            return self._finish()
        said = self._deltas()
        self.ended = True
        if self.instance and not told:
            word = CancelRequest(self.spec.request_id, self.attempt)
            said.append(SendTo(self.instance, word))
        said.append(failed(self.spec, code, message, retry_after_ms, param))
        return said

    def _move(self, told: bool = False) -> Sequence[Instruction]:
        """Leave the instance and ask for another, under the next attempt."""
        if self._all_finished():
            return self._finish()
        if self.num_moves >= MAX_MOVES:
            code = self._last_refusal or EngineError.code
            return self._fail(code, f"given up after {self.num_moves + 1} attempts", told=told)
        word = SendTo(self.instance, CancelRequest(self.spec.request_id, self.attempt))
        self.num_moves += 1
        self.attempt += 1
        self.instance = ""
        self._homeless_since = 0.0
        return (Wish.PLACE,) if told else (word, Wish.PLACE)

    def check(self) -> None:
        """InvariantError if the state cannot be."""
        for choice in self.choices:
            choice.check()
        if self.num_moves > MAX_MOVES:
            raise InvariantError(f"{self.spec.request_id}: {self.num_moves} moves")
