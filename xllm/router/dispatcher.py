"""Carries out what the states of open requests decide: the shell around the state machines.

It owns the table of open requests, the one flush timer and the choice of instances. It knows
sinks and a way to send to instances, but neither sockets nor HTTP. Invariant: a request is in the
table until its terminal message was handed to its sink, exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from xllm.errors import DeadlineError, InvariantError, UnavailableError, XllmError
from xllm.protocol.client import RequestFailed, RequestFinished, TokenDelta
from xllm.protocol.instance import (
    AdmitRequest,
    CancelRequest,
    PromptScores,
    RequestEnded,
    TokenBatch,
)
from xllm.protocol.transport.context import describe_error
from xllm.router.flush import FlushTimer
from xllm.router.inflight import DispatcherStatistics, InflightRequest, InstanceLinks
from xllm.router.metrics import RouterMetrics
from xllm.router.policy import Policy
from xllm.router.state.endings import failed
from xllm.router.state.instructions import Instruction, SendTo, Wish
from xllm.router.state.request import RequestLife
from xllm.router.view import ClusterView, ViewChange

_log = structlog.get_logger("router")


class Dispatcher:
    """All open requests of a router."""

    def __init__(
        self,
        view: ClusterView,
        policy: Policy,
        links: InstanceLinks,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._view = view
        self._policy = policy
        self._links = links
        self._metrics = metrics
        self._clock = clock
        self.open: dict[str, InflightRequest] = {}
        self._homeless: dict[str, InflightRequest] = {}
        self._timer = FlushTimer(clock, self._flush)
        self._empty = asyncio.Event()
        self._empty.set()

    # -- beginning and ending ----------------------------------------------------------------

    def enter(self, request_id: str, request: InflightRequest) -> None:
        """Note a request that will get its state later or now."""
        self.open[request_id] = request
        self._empty.clear()

    def start(self, request: InflightRequest, instructions: Sequence[Instruction]) -> None:
        """Its state is there: carry out the first instructions."""
        self._carry_out(request, instructions)

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
            self._carry_out(request, request.state.cancel(code, message))
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

    def batch(self, batch: TokenBatch) -> None:
        """All that one step gave this router. The hottest loop of the service."""
        table = self.open
        for scores in batch.prompt_scores:
            self._word(scores.request_id, scores)
        for item in batch.items:
            request = table.get(item.request_id)
            if request is None or (state := request.state) is None:
                self._metrics.num_dropped += 1
                continue
            try:
                instructions = state.tokens(item)
                if instructions:
                    self._carry_out(request, instructions)
            except Exception as error:
                self._broken(request, state, error)
        for ended in batch.ended:
            self._word(ended.request_id, ended)

    def _word(self, request_id: str, word: PromptScores | RequestEnded) -> None:
        request = self.open.get(request_id)
        if request is None or (state := request.state) is None:
            self._metrics.num_dropped += 1
            return
        try:
            if isinstance(word, RequestEnded):
                if word.code == UnavailableError.code and word.attempt == state.attempt:
                    self._view.refused(request.placed)
                self._carry_out(request, state.engine_ended(word))
            else:
                self._carry_out(request, state.prompt_scores(word))
        except Exception as error:
            self._broken(request, state, error)

    def _broken(self, request: InflightRequest, state: RequestLife, error: Exception) -> None:
        """A fault of ours in one request ends that request, and no other."""
        if isinstance(error, InvariantError):
            raise error
        spec = state.spec
        _log.error("request_broke", request_id=spec.request_id, error=describe_error(error))
        if self.open.pop(spec.request_id, None) is None:
            return
        state.ended = True
        if state.instance:
            self._links.send(state.instance, CancelRequest(spec.request_id, state.attempt))
        self._ended(request, failed(spec, XllmError.code, "an internal error", 0, None))

    def changed(self, change: ViewChange) -> None:
        """Instances were lost or became usable."""
        for name in change.lost:
            _log.warning("instance_lost", instance=name)
            self._move_all(name)
        if change.suspect:
            _log.warning("instance_silent", instances=change.suspect)
        if change.ready:
            _log.info("instance_ready", instances=change.ready)
            self._rehouse()
        if change.suspect or change.ready:
            self._desert()

    def _desert(self) -> None:
        """Move the requests of silent instances, if there is a better place for them."""
        for one in list(self._view):
            if one.suspect and one.num_inflight and self._view.usable(one.record.model):
                self._move_all(one.name)

    def _move_all(self, name: str) -> None:
        for request in list(self.open.values()):
            if request.placed == name and request.state is not None:
                self._carry_out(request, request.state.instance_lost(name))

    # -- time --------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """About ten times a second: deadlines, and requests without an instance."""
        late = [one for one in self.open.items() if one[1].deadline <= now]
        for request_id, request in late:
            if request.state is not None:
                self._carry_out(request, request.state.expire(now))
            else:
                self.abort(request_id, DeadlineError.code, "the request's time is over")
        if self._homeless:
            self._rehouse()

    def _rehouse(self) -> None:
        homeless = self._homeless
        self._homeless = {}
        for request_id, request in homeless.items():
            if request_id in self.open:
                self._place(request)

    def _flush(self, request: InflightRequest) -> None:
        state = request.state
        if state is None:
            return
        try:
            self._carry_out(request, state.flush())
        except Exception as error:
            self._broken(request, state, error)

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
            elif isinstance(one, SendTo):
                self._send(request, one)
            elif one is Wish.FLUSH:
                self._timer.add(request, state.hold_s)
            elif one is Wish.PLACE:
                self._metrics.num_moves += state.num_moves > 0
                self._leave(request)
                self._place(request)
            elif isinstance(one, RequestFinished | RequestFailed):
                del self.open[state.spec.request_id]
                self._homeless.pop(state.spec.request_id, None)
                self._metrics.num_dropped += state.num_dropped
                self._ended(request, one)

    def _place(self, request: InflightRequest) -> None:
        state = request.state
        assert state is not None
        usable = self._view.usable(state.spec.model)
        if state.avoid:
            usable = tuple(one for one in usable if one.name not in state.avoid)
        now = self._clock()
        if usable:
            stages = self._policy.choose(usable, len(state.spec.prompt_ids))
            self._carry_out(request, state.place(stages, now))
            return
        self._carry_out(request, state.unplaceable(now))
        if not state.ended:
            self._homeless[state.spec.request_id] = request

    def _send(self, request: InflightRequest, one: SendTo) -> None:
        reached = self._links.send(one.instance, one.message)
        if type(one.message) is not AdmitRequest:
            return
        request.placed = one.instance
        self._view.placed(one.instance)
        if not reached:
            # Later: the state is in the middle of its instructions.
            asyncio.get_running_loop().call_soon(self._unreached, request, one)

    def _unreached(self, request: InflightRequest, one: SendTo) -> None:
        state = request.state
        if state is not None and state.attempt == one.message.attempt:
            self._carry_out(request, state.instance_lost(one.instance))

    def _leave(self, request: InflightRequest) -> None:
        if request.placed:
            self._view.left(request.placed)
            request.placed = ""

    def _first_token(self, request: InflightRequest) -> None:
        request.told = True
        self._metrics.ttft.observe(self._clock() - request.started)

    def _ended(self, request: InflightRequest, last: RequestFinished | RequestFailed) -> None:
        self._leave(request)
        metrics = self._metrics
        if isinstance(last, RequestFinished):
            if not request.told:
                self._first_token(request)
            metrics.ended("ok")
            metrics.prompt_tokens += last.usage.prompt_tokens
            metrics.completion_tokens += last.usage.completion_tokens
            metrics.cached_tokens += last.usage.cached_tokens
        else:
            metrics.ended(last.code)
        metrics.duration.observe(self._clock() - request.started)
        self._deliver(request, last)
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
