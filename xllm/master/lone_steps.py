"""Steps that a request shares with nobody: for requests under which workers ended, twice.

One of them may be the reason, and the next end is to say which. So none of them is in a step with
another request, nor while a step of another is under way: what ends the worker then is known by
name. They go one after the other, each until it has passed where it was when its worker ended: it
has then computed all that was under way, and shares steps again. Between two such steps the others
have one, of which the time is bounded as ever. They come before what waits otherwise: while one
lacks a seat or blocks, nothing of its class or a lower one starts.
"""

from __future__ import annotations

from xllm.master.lifecycle import InstanceState
from xllm.master.making_room import RoomMaker
from xllm.master.plan_builder import PlanBuilder
from xllm.master.request import RequestState
from xllm.master.sequence import Sequence, SequencePhase
from xllm.master.starting import SequenceStarter
from xllm.master.strategies.step_budget import StepBudget
from xllm.protocol.instance import PASSED_TOKENS


class LoneSteps:
    """Whose turn it is, and what is in such a step. `is_wanted`: the next step is to be one, once
    nothing is under way. `is_short`: the next request lacks a seat or blocks."""

    def __init__(
        self,
        state: InstanceState,
        builder: PlanBuilder,
        room: RoomMaker,
        starter: SequenceStarter,
    ) -> None:
        self._state = state
        self._builder = builder
        self._room = room
        self._starter = starter
        self._number = 0
        self._was_last = False
        self.is_wanted = False
        self.is_short = False

    @property
    def is_under_way(self) -> bool:
        """Whether such a step is in flight: nothing else may be."""
        return self._number in self._state.steps

    def note(self, number: int, *, is_lone: bool) -> None:
        """A plan was made."""
        self._was_last = is_lone
        if is_lone:
            self._number = number

    def join_passed(self) -> None:
        """Requests that have passed where they were share steps from now on."""
        for request in tuple(self._state.lone.values()):
            known = request.message.outputs
            if all(
                len(seq.output) >= PASSED_TOKENS + _length(known, seq.choice)
                for seq in request.sequences
            ):
                self._state.join(request)

    def next_request(self) -> RequestState | None:
        """The one that runs, else the first that waits; None where none can do anything."""
        able = [one for one in self._state.lone.values() if _running(one) or _waiting(one)]
        return min(able, key=lambda one: (not _running(one), one.key), default=None)

    def is_due(self, request: RequestState | None) -> bool:
        """Whether the next step is this request's, if one can be made."""
        state = self._state
        self.is_short = False
        if request is None:
            return False
        forks = state.pending_forks
        if forks:  # The next plan introduces them, whose ever it is.
            return forks[0].child.request is request
        has_turn = not self._was_last
        waiting = _waiting(request)
        if waiting and not self._room.can_start(waiting[0], state.tables.match(waiting[0])):
            self.is_short = True
            return has_turn and (_running(request) or self._may_take(request))
        return has_turn

    def holds_back(self, now: float) -> bool:
        """Whether nothing of the queue may start now, so that the next request can."""
        request = self.next_request() if self.is_short else None
        first = self._state.waiting.peek(now)
        return request is not None and first is not None and request.key[0] <= first.key[0]

    def add(self, request: RequestState, budget: StepBudget) -> int:
        """Put a step of this request into the plan: prefills, or decodes where there are none. How
        many decode. Nothing may be in flight."""
        state = self._state
        assert not state.steps
        self._add_prefills(request, budget)
        if not self._builder.is_empty:
            return 0
        decodes = [seq for seq in state.decoding if seq.request is request]
        self._room.grow(decodes)
        return self._builder.add_decodes(decodes, self._room.sitting_out)

    def _add_prefills(self, request: RequestState, budget: StepBudget) -> None:
        state, starter = self._state, self._starter
        prefilling = [seq for seq in state.prefilling if seq.request is request]
        starter.begin(prefilling)
        for seq in prefilling:
            remaining = seq.num_tokens - seq.num_planned
            share = starter.share(budget, seq.num_planned, remaining) if budget.tokens > 0 else 0
            if share <= 0:
                return
            budget.take(seq.num_planned, share)
            self._builder.add_prefill(seq, share)
        for seq in _waiting(request):
            match = state.tables.match(seq)
            if starter.is_held(seq, match):
                continue
            if self._may_take(request):
                self._room.make_room(seq, match)
                match = state.tables.match(seq)
            share = starter.share_of(seq, match, budget) if budget.tokens > 0 else 0
            if share <= 0:
                return
            starter.start(seq, match, share, budget)

    def _may_take(self, request: RequestState) -> bool:
        """Whether there are offline sequences that may give way to this request."""
        state = self._state
        has_victims = state.num_offline_running > 0 or bool(state.paused)
        return has_victims and not request.key[0] and not state.policy.never_evicts


def _running(request: RequestState) -> bool:
    return any(seq.state is SequencePhase.RUNNING for seq in request.sequences)


def _waiting(request: RequestState) -> list[Sequence]:
    """Its sequences that wait, the first first."""
    waiting = [seq for seq in request.sequences if seq.state is SequencePhase.WAITING]
    return sorted(waiting, key=lambda seq: seq.key)


def _length(outputs: tuple[tuple[int, ...], ...], choice: int) -> int:
    return len(outputs[choice]) if choice < len(outputs) else 0
