"""Carries out what the states of open requests decide: the shell around the state machines.

It owns the table of open requests, the one flush timer and the choice of instances. It knows
sinks and a way to send to instances, but neither sockets nor HTTP. Invariant: a request is in the
table until its terminal message was handed to its sink, exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec

import structlog

from xllm.errors import DeadlineError, InvariantError, XllmError
from xllm.protocol.generation import RequestFailed, RequestFinished, TokenDelta
from xllm.protocol.instance import (
    CancelRequest,
    RequestEnded,
    TokenBatch,
    TokenItem,
)
from xllm.protocol.transport.context import describe_error
from xllm.router.flush import FlushTimer
from xllm.router.inflight import AdmissionDoor, DispatcherStatistics, InflightRequest, InstanceLinks
from xllm.router.metrics import RouterMetrics
from xllm.router.placement import Placement
from xllm.router.state.endings import failed
from xllm.router.state.instructions import Instruction, SendTo, Wish
from xllm.router.state.move_budget import MoveBudget
from xllm.router.state.prompt_words import PromptWord
from xllm.router.state.request import RequestLife
from xllm.router.view import ViewChange

_log = structlog.get_logger("router")
P = ParamSpec("P")


class Dispatcher:
    """All open requests of a router."""

    def __init__(
        self,
        placement: Placement,
        links: InstanceLinks,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._placement = placement
        self._links = links
        self._metrics = metrics
        self._clock = clock
        self.open: dict[str, InflightRequest] = {}
        self.door: AdmissionDoor | None = None
        """Who hears of ends, and takes requests back that all instances refuse."""
        self._homeless: dict[str, InflightRequest] = {}
        self._foreign: set[str] = set()
        """Instances that spoke of what they do not run, and were named in the log."""
        self._budget = MoveBudget()
        self._timer = FlushTimer(clock, self._flush)
        self._empty = asyncio.Event()
        self._empty.set()

    # -- beginning and ending ----------------------------------------------------------------

    def enter(self, request_id: str, request: InflightRequest) -> None:
        """Note a request that will get its state later or now."""
        self.open[request_id] = request
        self._budget.arrived()
        self._empty.clear()

    def start(self, request: InflightRequest, instructions: Sequence[Instruction]) -> None:
        """Its state is there: carry out the first instructions."""
        try:
            self._carry_out(request, instructions)
        except Exception as error:
            self._broken(request, error)

    def fail(self, request_id: str, request: InflightRequest, failed: RequestFailed) -> None:
        """The terminal message of a request without a state."""
        del self.open[request_id]
        if request.encoding is not None:
            request.encoding.cancel()
        self._ended(request, failed)

    def abort(self, request_id: str, code: str, message: str) -> None:
        """End a request early. Unknown ones are ignored."""
        request = self.open.get(request_id)
        if request is None:
            return
        if request.state is not None:
            self._tell(request, RequestLife.cancel, code, message)
            return
        failed = RequestFailed(
            id=request.client_id, code=code, message=message, request_id=request_id
        )
        self.fail(request_id, request, failed)

    def slow_down(self, request_id: str, hold_s: float) -> None:
        """Hold a request's tokens at least so long (0: as long as was asked)."""
        request = self.open.get(request_id)
        if request is not None and request.state is not None:
            request.state.hold_s = max(hold_s, request.state.spec.hold_s)

    async def wait_empty(self) -> None:
        """Until no request is open."""
        await self._empty.wait()

    # -- words of instances ------------------------------------------------------------------

    def batch(self, name: str, batch: TokenBatch) -> None:
        """All that one step of an instance gave this router. The hottest loop of the service."""
        table = self.open
        for scores in batch.prompt_scores:
            self._word(name, scores)
        for vector in batch.vectors:
            self._word(name, vector)
        on_trial = self._placement.breakers.on_trial
        for item in batch.items:
            request = table.get(item.request_id)
            if request is None or (state := request.state) is None:
                self._metrics.num_dropped += 1
                continue
            if state.instance != name and item.attempt == state.attempt:
                self._refuse(name, item)
                continue
            try:
                instructions = state.tokens(item)
                if on_trial and item.attempt == state.attempt:
                    self._placement.answers(request)
                if instructions:
                    self._carry_out(request, instructions)
            except Exception as error:
                self._broken(request, error)
        for ended in batch.ended:
            self._word(name, ended)

    def _word(self, name: str, word: PromptWord | RequestEnded) -> None:
        request = self.open.get(word.request_id)
        if request is None or (state := request.state) is None:
            self._metrics.num_dropped += 1
        elif state.instance != name and word.attempt == state.attempt:
            self._refuse(name, word)
        elif isinstance(word, RequestEnded):
            if word.attempt == state.attempt:
                self._placement.ended(request, word)
            self._tell(request, RequestLife.engine_ended, word)
        else:
            self._tell(request, RequestLife.prompt_word, word)

    def _refuse(self, name: str, word: TokenItem | PromptWord | RequestEnded) -> None:
        """A word of the present attempt, of an instance that it was not sent to."""
        self._metrics.num_foreign += 1
        if name not in self._foreign:
            self._foreign.add(name)
            _log.error(
                "instance_speaks_for_another",
                instance=name,
                request_id=word.request_id,
                word=type(word).__name__,
            )

    def _tell(
        self,
        request: InflightRequest,
        event: Callable[Concatenate[RequestLife, P], Sequence[Instruction]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Tell a request's state of an event and do what it says. A fault of ours in one request
        ends that request, and no other."""
        state = request.state
        if state is None:
            return
        try:
            self._carry_out(request, event(state, *args, **kwargs))
        except Exception as error:
            self._broken(request, error)

    def _broken(self, request: InflightRequest, error: Exception) -> None:
        if isinstance(error, InvariantError):
            raise error
        state = request.state
        assert state is not None
        spec = state.spec
        _log.error("request_broke", request_id=spec.request_id, error=describe_error(error))
        if self.open.pop(spec.request_id, None) is None:
            return
        self._homeless.pop(spec.request_id, None)
        state.ended = True
        if state.instance:
            self._links.send(state.instance, CancelRequest(spec.request_id, state.attempt))
        self._ended(request, failed(spec, XllmError.code, "an internal error", 0, None))

    def changed(self, change: ViewChange) -> None:
        """Instances were lost or became usable."""
        for name in change.lost:
            self._foreign.discard(name)
            if name in change.left:
                _log.info("instance_left", instance=name)
            else:
                _log.warning("instance_lost", instance=name)
                self._placement.died(name)
            self._move_all(name)
        if change.suspect:
            _log.warning("instance_silent", instances=change.suspect)
        if change.ready:
            _log.info("instance_ready", instances=change.ready)
            self._rehouse()
            if self.door is not None:
                self.door.instances_ready()
        if change.suspect or change.ready:
            for name in self._placement.deserted():
                self._move_all(name)

    def _move_all(self, name: str) -> None:
        for request in list(self.open.values()):
            if request.placed == name:
                self._tell(request, RequestLife.instance_lost, name)

    # -- time --------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """About ten times a second: deadlines, and requests without an instance."""
        late = [one for one in self.open.items() if one[1].deadline <= now]
        for request_id, request in late:
            if request.state is not None:
                self._tell(request, RequestLife.expire, now)
            else:
                self.abort(request_id, DeadlineError.code, "the request's time is over")
        if self._homeless:
            self._rehouse()

    def _rehouse(self) -> None:
        homeless = self._homeless
        self._homeless = {}
        for request_id, request in homeless.items():
            if request_id in self.open:
                try:
                    self._place(request)
                except Exception as error:
                    self._broken(request, error)

    def _flush(self, request: InflightRequest) -> None:
        self._tell(request, RequestLife.flush)

    def close(self) -> None:
        """Stop the timer."""
        self._timer.close()

    # -- carrying out ------------------------------------------------------------------------

    def _carry_out(self, request: InflightRequest, instructions: Sequence[Instruction]) -> None:
        state = request.state
        assert state is not None
        for one in instructions:
            kind = type(one)
            if kind is TokenDelta:
                if not request.told:
                    self._first_token(request)
                self._deliver(request, one)  # type: ignore[arg-type]  # by `kind`
            elif kind is SendTo:
                self._send(request, one)  # type: ignore[arg-type]  # by `kind`
            elif one is Wish.FLUSH:
                self._timer.add(request, state.hold_s)
            elif one is Wish.PLACE:
                request.is_moving = state.moves.num_moves > 0
                self._metrics.num_moves += request.is_moving
                self._placement.leave(request)
                self._place(request)
            else:
                del self.open[state.spec.request_id]
                self._homeless.pop(state.spec.request_id, None)
                self._metrics.num_dropped += state.num_dropped
                if state.moves.is_convicted:
                    _log.error("request_ends_workers", request_id=state.spec.request_id)
                self._ended(request, one)  # type: ignore[arg-type]  # nothing else is left

    def _place(self, request: InflightRequest) -> None:
        state = request.state
        assert state is not None
        now = self._clock()
        stages = self._placement.choose(state)
        if stages is not None:
            if request.is_moving and not self._budget.take(state.moves.num_moves, now):
                self._hold_back(request, now)
                return
            self._metrics.num_alone += state.is_suspect
            self._carry_out(request, state.place(stages, now))
            return
        if self.door is not None and self.door.take_back(request):
            return
        self._carry_out(request, state.unplaceable(now))
        if not state.ended:
            self._homeless[state.spec.request_id] = request

    def _hold_back(self, request: InflightRequest, now: float) -> None:
        """Too many move at present: it waits its turn among those without an instance."""
        state = request.state
        assert state is not None
        self._metrics.num_held_back += not state.moves.homeless_since
        self._carry_out(request, state.held_back(now))
        if not state.ended:
            self._homeless[state.spec.request_id] = request

    def _send(self, request: InflightRequest, one: SendTo) -> None:
        code = self._placement.send(request, one)
        if code:
            # Later: the state is in the middle of its instructions.
            asyncio.get_running_loop().call_soon(self._unreached, request, one, code)

    def _unreached(self, request: InflightRequest, one: SendTo, code: str) -> None:
        self._tell(request, RequestLife.unreached, one.instance, one.message.attempt, code)

    def _first_token(self, request: InflightRequest) -> None:
        request.told = True
        self._metrics.ttft.observe(self._clock() - request.started)

    def _ended(self, request: InflightRequest, last: RequestFinished | RequestFailed) -> None:
        self._placement.leave(request)
        if isinstance(last, RequestFinished) and not request.told:
            self._first_token(request)
        self._metrics.ended(last, self._clock() - request.started)
        self._deliver(request, last)
        if self.door is not None:
            self.door.left(request, last)
        if not self.open:
            self._empty.set()

    def _deliver(
        self, request: InflightRequest, message: TokenDelta | RequestFinished | RequestFailed
    ) -> None:
        try:
            request.sink.send(message)
        except Exception as error:  # a front end's fault must not reach other requests
            _log.error("sink_failed", error=describe_error(error))

    def statistics(self) -> DispatcherStatistics:
        """How many requests are where."""
        num_encoding = sum(one.state is None for one in self.open.values())
        return DispatcherStatistics(len(self.open), num_encoding, len(self._homeless))

    def check(self) -> None:
        """InvariantError if the state cannot be."""
        for request_id, request in self.open.items():
            if request.state is not None:
                request.state.check()
                if request.state.ended:
                    raise InvariantError(f"{request_id} has ended and is open")
        if self._empty.is_set() == bool(self.open):
            raise InvariantError("the table's emptiness is not what it says")
