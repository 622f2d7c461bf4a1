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
    OverloadedError,
    UnavailableError,
    WorkerLostError,
)
from xllm.protocol.generation import ResumePoint, next_life
from xllm.protocol.instance import CancelRequest, RequestEnded, TokenItem
from xllm.protocol.sampling import TokenLogprobs
from xllm.router.state.choice import ChoiceState
from xllm.router.state.cutting import cut_at
from xllm.router.state.death_marks import DeathMarks
from xllm.router.state.endings import failed, finished
from xllm.router.state.instructions import Instruction, SendTo, Wish
from xllm.router.state.moves import MoveRecord
from xllm.router.state.prompt_words import PromptWord, PromptWords
from xllm.router.state.spec import RequestSpec
from xllm.router.text.output import TextOutput

_NOTHING: tuple[Instruction, ...] = ()
_FLUSH: tuple[Instruction, ...] = (Wish.FLUSH,)
_MOVABLE = frozenset((UnavailableError.code, OverloadedError.code))
"""Refusals of a master after which another may serve the request."""


class RequestLife:
    """One request, from its submission to its terminal message."""

    __slots__ = (
        "_flush_wished",
        "_heard",
        "_marks",
        "_prompt_words",
        "attempt",
        "cached_tokens",
        "choices",
        "ended",
        "hold_s",
        "instance",
        "moves",
        "num_dropped",
        "spec",
    )

    def __init__(self, spec: RequestSpec, outputs: Sequence[TextOutput]) -> None:
        matches = bool(spec.sampling.stop)
        self.spec = spec
        self.choices = [ChoiceState(k, output, matches) for k, output in enumerate(outputs)]
        self.attempt = 1
        self.instance = ""
        """Where the present attempt runs; empty: nowhere yet."""
        self.moves = MoveRecord()
        self.ended = False
        self.hold_s = spec.hold_s
        """How long tokens are held at present; longer than asked while the client reads slowly."""
        self.cached_tokens = 0
        self.num_dropped = 0
        self._marks = DeathMarks()
        """Of deaths that this request may be the reason of."""
        self._flush_wished = False
        self._heard = False
        """Whether the present attempt was accepted: a word of it came."""
        self._prompt_words = PromptWords(spec.embed)
        if spec.sampling.prompt_logprobs is not None:
            self._prompt_words.scores = [None] * len(spec.prompt_ids)

    # -- starting and moving -----------------------------------------------------------------

    def resume(self, point: ResumePoint) -> Sequence[Instruction]:
        """Before `place`: take over what the client already holds. The answer may be complete:
        then this ends the request. Where something of those tokens must be said that only the
        engine knows, it draws them again; a client that has them drops them as doubles."""
        self.attempt = next_life(point.attempt)
        self.moves.resumed = True
        sampling = self.spec.sampling
        again = sampling.prompt_logprobs is not None
        again |= sampling.logprobs is not None and not self.spec.stream
        for choice, ids in zip(self.choices, point.outputs, strict=True):
            if again:
                choice.border = len(ids)
            elif ids:
                choice.resume(ids, self.spec)
        if self._all_finished():
            return self._finish()
        return (*self._deltas(), Wish.PLACE)

    def recall(self, outputs: Sequence[Sequence[int]]) -> Sequence[Instruction]:
        """Before `place`: the first tokens of its choices are known (empty: they are not), as if
        a first attempt had drawn them here."""
        said: list[Instruction] = []
        for choice, ids in zip(self.choices, outputs, strict=True):
            if ids:
                word = TokenItem(self.spec.request_id, choice.index, self.attempt, 0, tuple(ids))
                said += self.tokens(word)
        said = [one for one in said if not isinstance(one, SendTo)]  # it runs nowhere yet
        self.attempt += 1
        self.moves.resumed = True
        self._heard = False
        return [*said, *self._finish()] if self._all_finished() else [*said, Wish.PLACE]

    def place(self, stages: tuple[tuple[str, str], ...], now: float) -> Sequence[Instruction]:
        """Run on that route, under the present attempt."""
        if self.ended or self.instance:
            return _NOTHING
        self.instance = stages[0][1]
        choices = self.choices
        outputs: tuple[tuple[int, ...], ...] = ()
        if self.attempt > 1 and any(choice.ids for choice in choices):
            outputs = tuple(tuple(choice.ids) for choice in choices)
        self._review()
        admit = self.spec.admit(self.attempt, stages, outputs, now, alone=self.moves.runs_alone)
        if not outputs:
            return (SendTo(self.instance, admit),)
        return (
            SendTo(self.instance, admit),
            *(self._cancel(choice.index) for choice in choices if choice.finish_reason),
        )

    def unplaceable(self, now: float) -> Sequence[Instruction]:
        """There is no instance for it now: fail, or wait for one if it had one before."""
        if self.ended:
            return _NOTHING
        end = self.moves.homeless(now, has_tokens=any(choice.ids for choice in self.choices))
        return _NOTHING if end is None else self._fail(*end, 1000)

    def held_back(self, now: float) -> Sequence[Instruction]:
        """It may not move yet: wait, but not forever."""
        end = None if self.ended else self.moves.held_back(now)
        return _NOTHING if end is None else self._fail(*end, 1000)

    def instance_lost(self, instance: str) -> Sequence[Instruction]:
        """That instance is gone or suspect: go on elsewhere from the tokens received."""
        if self.ended or self.instance != instance:
            return _NOTHING
        return self._lost()

    def unreached(self, instance: str, attempt: int, code: str) -> Sequence[Instruction]:
        """The attempt never left for that instance: as good as a refusal."""
        if self.ended or self.instance != instance or self.attempt != attempt:
            return _NOTHING
        return self._refused(code)

    # -- words of the instance ---------------------------------------------------------------

    def tokens(self, item: TokenItem) -> Sequence[Instruction]:
        """New tokens of one choice."""
        number = item.choice
        choices = self.choices
        if item.attempt != self.attempt or self.ended or not 0 <= number < len(choices):
            self.num_dropped += 1
            return _NOTHING
        if not self._heard:
            self._heard = True
            self.moves.accepted()
        choice = choices[number]
        if choice.finish_reason:
            return _NOTHING
        if choice.border:
            return self._up_to_border(choice, item)
        new = item.token_ids
        logprobs = item.logprobs
        have = len(choice.ids)
        if item.first_index != have:
            if item.first_index > have:
                return self._lost()  # tokens were lost on the way
            self.num_dropped += 1
            new = new[have - item.first_index :]
            if logprobs is not None:
                logprobs = logprobs[have - item.first_index :]
            if not new and not item.finish_reason:
                return _NOTHING
        if item.finish_reason:
            return self._last_tokens(choice, new, logprobs, item)
        if choice.take(new, logprobs):  # a stop string, of which the engine does not know
            return self._choice_ended(choice, (self._cancel(choice.index),))
        spec = self.spec
        if not spec.stream:
            return _NOTHING
        if not choice.num_sent or not self.hold_s:
            return (choice.delta(spec.client_id, self.attempt),)
        if self._flush_wished:
            return _NOTHING
        self._flush_wished = True
        return _FLUSH

    def prompt_word(self, word: PromptWord) -> Sequence[Instruction]:
        """Scores of a piece of the prompt, or its vector."""
        if word.attempt != self.attempt or self.ended or not self._prompt_words.add(word):
            self.num_dropped += 1
        return _NOTHING

    def engine_ended(self, word: RequestEnded) -> Sequence[Instruction]:
        """The master's one terminal word on an attempt."""
        if word.attempt != self.attempt or self.ended:
            self.num_dropped += 1
            return _NOTHING
        if not word.code:
            self.cached_tokens = word.cached_tokens
            # An end without all tokens means that some were lost on the way.
            return self._finish() if self._all_finished() else self._lost()
        if word.code == WorkerLostError.code and word.blameless:
            return self._lost(told=True)
        if word.code == WorkerLostError.code or word.shared:
            return self._died(word.shared)
        if word.code in _MOVABLE:
            return self._refused(word.code)
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

    # -- borders -----------------------------------------------------------------------------

    def _up_to_border(self, choice: ChoiceState, item: TokenItem) -> Sequence[Instruction]:
        """Tokens of a choice that is not behind its border yet: those up to it are said apart
        from those beyond, and from the end."""
        border, choice.border = choice.border, 0
        end = item.first_index + len(item.token_ids)
        if border > end or (border == end and item.finish_reason and item.stop_id >= 0):
            # The border is further on, or behind a stop id, which has no text.
            said = self.tokens(item)
            if len(choice.ids) < border:
                choice.border = border
            return said
        first, rest = cut_at(item, border)
        parts = list(self.tokens(first))
        if len(choice.ids) < border:
            choice.border = 0 if choice.finish_reason else border
            return parts  # it ended, or the attempt was lost, before the border
        if self.spec.stream and choice.num_sent < len(choice.ids):
            parts.append(choice.delta(self.spec.client_id, self.attempt))
        if rest.token_ids or rest.finish_reason:
            parts += self.tokens(rest)
        return parts

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

    def _cancel(self, choice: int = -1) -> SendTo:
        return SendTo(self.instance, CancelRequest(self.spec.request_id, self.attempt, choice))

    def _all_finished(self) -> bool:
        for choice in self.choices:
            if not choice.finish_reason:
                return False
        return self._prompt_words.is_complete

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
        said.append(finished(spec, self.choices, self.cached_tokens, self._prompt_words))
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
            said.append(self._cancel())
        said.append(failed(self.spec, code, message, retry_after_ms, param))
        return said

    def _refused(self, code: str) -> Sequence[Instruction]:
        if self._all_finished():
            return self._finish()
        self.moves.refused(self.instance, code)
        return self._move(told=True)

    def _lost(self, *, told: bool = False) -> Sequence[Instruction]:
        if self._all_finished():
            return self._finish()
        why = self.moves.lost()
        return self._fail(EngineError.code, why, told=told) if why else self._move(told)

    def _died(self, shared: bool) -> Sequence[Instruction]:
        """Its instance died in a step of it, and it may be the reason."""
        if self._all_finished():
            return self._finish()
        self._review()
        why = self.moves.died(self.instance, shared=shared)
        self._marks.set_at(self.choices)
        return self._fail(EngineError.code, why, told=True) if why else self._move(told=True)

    def _review(self) -> None:
        if self.moves.num_deaths and self._marks.are_passed_by(self.choices):
            self.moves.passed()

    @property
    def is_suspect(self) -> bool:
        """Whether it is one of few that may be the reason of deaths, and has not passed yet."""
        return self.moves.runs_alone and not self._marks.are_passed_by(self.choices)

    def _move(self, told: bool) -> Sequence[Instruction]:
        """Leave the instance and ask for another, under the next attempt."""
        cancel = self._cancel()
        self.attempt += 1
        self.instance = ""
        self._heard = False
        return (Wish.PLACE,) if told else (cancel, Wish.PLACE)

    def check(self) -> None:
        """InvariantError if the state cannot be."""
        self.moves.check()
        for choice in self.choices:
            choice.check()
