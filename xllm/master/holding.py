"""Requests that are prefilled here and decoded elsewhere: their first tokens, then the hold.

When the last prompt token of such a request is computed, its first tokens go out as ever, and its
sequences leave the running ones with their blocks (phase HELD) so that another instance can take
the KV. `PrefillDone` says so once for a request. The hold ends when the router releases, cancels
or replaces the request, or when its time is over; then the blocks are the prefix cache's. Never
computes: whoever decodes here after all comes as a new attempt and finds the blocks cached.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from xllm.errors import UnavailableError
from xllm.master.lifecycle import InstanceState
from xllm.master.request import RequestState
from xllm.master.sequence import Sequence, SequencePhase
from xllm.protocol.instance import PrefillDone, TokenItem
from xllm.protocol.sampling import TokenLogprobs

_Logprobs = tuple[TokenLogprobs, ...] | None


class PrefillHolder:
    """Carries the end of a prefill into an InstanceState."""

    def __init__(self, state: InstanceState) -> None:
        self._state = state

    def take(
        self,
        seq: Sequence,
        drawn: tuple[int, ...],
        logprobs: AbstractSequence[_Logprobs],
        now: float,
    ) -> None:
        """A prefilled sequence drew a token, or a leader one for each choice."""
        request = seq.request
        if seq.num_samples == 1:
            first_index = len(seq.output)
            seq.output.extend(drawn)
            seq.num_tokens += 1
            reason = seq.finish_reason()
            self._say(request, seq.choice, first_index, drawn, reason, logprobs[0])
            if reason:
                self._state.finish_sequence(seq)
                self._state.close_choice(request, seq.choice)
        else:
            for choice, token in enumerate(drawn):
                if request.is_open(choice):
                    reason = Sequence(request, choice, [token], []).finish_reason()
                    self._say(request, choice, 0, (token,), reason, logprobs[choice])
                    if reason:
                        self._state.close_choice(request, choice)
        if seq.state is SequencePhase.RUNNING:
            self._state.hold(seq)
            self._state.holds.push(request, now + self._state.limits.hold_s)
        self._tell(request)

    def _say(
        self,
        request: RequestState,
        choice: int,
        first_index: int,
        token_ids: tuple[int, ...],
        reason: str,
        logprobs: _Logprobs,
    ) -> None:
        stop_id = token_ids[-1] if reason == "stop" else -1
        self._state.outcome.items.append(
            TokenItem(
                request.request_id,
                choice,
                request.attempt,
                first_index,
                token_ids,
                reason,
                stop_id,
                logprobs,
            )
        )

    def _tell(self, request: RequestState) -> None:
        """Say it once all that is open of the request is held."""
        if not request.open_choices or not request.is_held:
            return
        state = self._state
        num_tokens = request.sequences[0].num_computed
        hold_ms = int(state.limits.hold_s * 1000)
        state.outcome.prefilled.append(
            PrefillDone(request.request_id, request.attempt, num_tokens, hold_ms)
        )


def end_holds(state: InstanceState, now: float) -> None:
    """End, with a word, the requests whose first hold is over: nobody came for them. A request
    that is held in part ends too: what it holds may be what its other choices wait for."""
    for request in state.holds.pop_passed(now):
        if request.open_choices:
            state.end_request(
                request, UnavailableError.code, "nobody took the prefilled request in time"
            )
