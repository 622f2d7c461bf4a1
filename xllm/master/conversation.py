"""The conversation with routers: what each message asks of the master, and where answers go.

Holds the connections' requests (`routes`), what leaders commanded, and open probes. Knows
nothing of steps. A connection that is lost has its requests aborted after a second, unless a
higher attempt of them came by another one meanwhile; one that does not read has them ended, and
hears so when it reads again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import structlog

from xllm.errors import (
    BackpressureError,
    BrokenError,
    ConflictError,
    InvariantError,
    UnavailableError,
    XllmError,
)
from xllm.master.leader_commands import LeaderCommands
from xllm.master.outcome import StepOutcome
from xllm.master.routes import RequestRoutes
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import (
    AdmitRequest,
    AssignRole,
    CancelRequest,
    DrainInstance,
    FrameRefused,
    HeldTokens,
    InstancePong,
    InstanceRequest,
    PingInstance,
    PooledVector,
    ProbeAnswer,
    ProbeInstance,
    PromptScores,
    QuerySnapshot,
    QueryTokens,
    ReleaseHold,
    RequestEnded,
    SetSleep,
    SleepSet,
    TokenBatch,
    TokenItem,
)
from xllm.protocol.transport.router import RouterSocket

if TYPE_CHECKING:
    from xllm.master.served_model import ServedModel

_log = structlog.get_logger("routers")

ORPHAN_S = 1.0
"""How long the requests of a lost connection run on."""
PROBE_S = 5.0
VOID_PERIOD_S = 0.1
"""How often a router that did not read is tried again."""


class RouterConversation:
    """Lives inside the master's actor; `master`: the model that it speaks for."""

    def __init__(self, master: ServedModel, endpoint: str) -> None:
        self._master = master
        self.routes = RequestRoutes()
        self.commands = LeaderCommands(master, self._send, self._name_of)
        self._probes: dict[int, tuple[bytes, int]] = {}
        # Attempts of which a router that did not read has lost words, until it was told.
        self._voids: dict[bytes, dict[str, int]] = {}
        self._num_probes = 0
        self._foreign: set[bytes] = set()
        """Connections that spoke of others' requests, and were named in the log."""
        self._socket = RouterSocket(
            master.transport,
            endpoint,
            Decoder[InstanceRequest](InstanceRequest),
            self._on_message,
            on_gone=self._on_gone,
            bad_reply=lambda text: FrameRefused(text),
            name="routers",
        )
        self.endpoint = self._socket.endpoint

    def close(self) -> None:
        """Close the socket; open probes stay unanswered."""
        self._probes.clear()
        self._voids.clear()
        self._socket.close()

    def route(self, outcome: StepOutcome) -> None:
        """Send an outcome, one batch a router; what was prefilled after its tokens."""
        for router, batch in self.routes.split(outcome):
            self._send(router, batch)
        for done in outcome.prefilled:
            if router := self.routes.owner(done.request_id):
                self._send(router, done)
        self._socket.flush()  # the next step may be planned in this turn of the loop

    def _send(self, router: bytes, message: msgspec.Struct) -> None:
        try:
            self._socket.send(router, message)
        except BrokenError:
            pass  # it is gone: `_on_gone` ends its requests
        except BackpressureError:
            self._void(router, message)

    def end_all(self, code: str, message: str, *, shared: bool) -> None:
        """Give every open request its terminal word, without the scheduler. `shared`: see
        RequestEnded."""
        for router in self.routes.routers:
            owned = self.routes.owned_by(router)
            for request_id, _ in owned:
                self.routes.remove(request_id)
            ended = tuple(
                RequestEnded(name, attempt, code, message, shared=shared) for name, attempt in owned
            )
            self._send(router, TokenBatch(ended=ended))

    # -- routers that do not read --------------------------------------------------------------

    def _void(self, router: bytes, lost: msgspec.Struct) -> None:
        """A router that does not read has lost tokens by now: what it has open is void, and so
        is what the lost message spoke of."""
        owned = self.routes.owned_by(router)
        _log.warning("router_does_not_read", num_requests=len(owned))
        if router not in self._voids:
            self._voids[router] = {}
            self._master.later(VOID_PERIOD_S, self._tell_void, router)
        voids = self._voids[router]
        if isinstance(lost, TokenBatch):
            parts: list[TokenItem | RequestEnded | PromptScores | PooledVector]
            parts = [*lost.items, *lost.ended, *lost.prompt_scores, *lost.vectors]
            for part in parts:
                voids[part.request_id] = max(part.attempt, voids.get(part.request_id, 0))
        voids.update(owned)
        self._abort(owned)

    def _tell_void(self, router: bytes) -> None:
        voids = self._voids.get(router)
        if voids is None:
            return
        text = "the router did not read the answer in time"
        ended = tuple(
            RequestEnded(name, attempt, UnavailableError.code, text)
            for name, attempt in voids.items()
        )
        try:
            self._socket.send(router, TokenBatch(ended=ended))
        except BackpressureError:
            self._master.later(VOID_PERIOD_S, self._tell_void, router)
            return
        except BrokenError:
            pass  # it is gone, and nobody waits for the word
        del self._voids[router]

    # -- messages ------------------------------------------------------------------------------

    def _on_message(self, router: bytes, message: InstanceRequest, frames: list[bytes]) -> None:
        if isinstance(message, AdmitRequest):
            self._admit(router, message)
        elif isinstance(message, CancelRequest):
            self._cancel(router, message)
        elif isinstance(message, ReleaseHold):
            self._release(router, message)
        elif isinstance(message, PingInstance):
            self._pong(router, message)
        elif isinstance(message, ProbeInstance):
            self._probe(router, message)
        elif isinstance(message, QuerySnapshot):
            self._send(router, self._master.snapshot())
        elif isinstance(message, QueryTokens):
            self._tell_tokens(router, message)
        elif isinstance(message, SetSleep):
            self._master.spawn(self._set_sleep(router, message))
        elif isinstance(message, AssignRole | DrainInstance):
            self.commands.command(router, message)

    def _pong(self, router: bytes, message: PingInstance) -> None:
        try:
            self._socket.send(router, InstancePong(message.number))
        except (BrokenError, BackpressureError):
            pass  # it is gone, or will see by the lack of it that it does not read

    def _tell_tokens(self, router: bytes, message: QueryTokens) -> None:
        scheduler = self._master.scheduler
        request = None if scheduler is None else scheduler.requests.get(message.request_id)
        outputs = () if request is None else request.outputs()
        try:
            self._socket.send(router, HeldTokens(message.number, outputs))
        except (BrokenError, BackpressureError):
            pass  # it is gone, or does not read: it does without

    async def _set_sleep(self, router: bytes, message: SetSleep) -> None:
        try:
            await self._master.set_sleep(
                message.asleep, message.timeout_ms / 1000, message.drop_weights
            )
        except XllmError as error:
            self._send(router, SleepSet(message.nonce, error.code, error.message))
        else:
            self._send(router, SleepSet(message.nonce))

    def _admit(self, router: bytes, message: AdmitRequest) -> None:
        master = self._master
        scheduler = master.scheduler
        if scheduler is None:
            refusal: RequestEnded | None = RequestEnded(
                message.request_id,
                message.attempt,
                UnavailableError.code,
                f"the instance is {master.state}",
            )
        elif master.is_asleep:
            refusal = RequestEnded(
                message.request_id,
                message.attempt,
                UnavailableError.code,
                f"the model {master.model} is asleep",
            )
        elif self._is_foreign(router, message):
            refusal = RequestEnded(
                message.request_id,
                message.attempt,
                ConflictError.code,
                "this attempt runs here for another connection",
            )
        else:
            try:
                refusal = master.steps.call(scheduler.admit, message, time.monotonic())
            except InvariantError:
                # It ends with all that are open, and is as likely the reason as they are.
                self.routes.add(message.request_id, message.attempt, router)
                raise
        if refusal is not None:
            master.metrics.num_refused += 1
            self._send(router, TokenBatch(ended=(refusal,)))
            return
        if message.attempt > self.routes.attempt(message.request_id):
            master.metrics.num_admitted += 1
            self.routes.add(message.request_id, message.attempt, router)
        master.steps.pump()

    def _is_foreign(self, router: bytes, message: AdmitRequest) -> bool:
        """Whether another connection's request has this attempt already."""
        request_id = message.request_id
        if self.routes.attempt(request_id) != message.attempt:
            return False
        return self.routes.owner(request_id) != router

    def _cancel(self, router: bytes, message: CancelRequest) -> None:
        scheduler = self._master.scheduler
        if scheduler is None or message.attempt < self.routes.attempt(message.request_id):
            return
        if not self._owns(router, message):
            return
        self._master.steps.call(
            scheduler.cancel, message.request_id, message.attempt, message.choice
        )
        if message.choice < 0:
            self.routes.remove(message.request_id)
        self._master.steps.pump()

    def _release(self, router: bytes, message: ReleaseHold) -> None:
        steps = self._master.steps
        if steps.scheduler is None or not self._owns(router, message):
            return
        if steps.call(steps.scheduler.release_hold, message.request_id, message.attempt):
            self.routes.remove(message.request_id)
            steps.pump()

    def _owns(self, router: bytes, message: CancelRequest | ReleaseHold) -> bool:
        """Whether a connection may end that request: nobody else's that is open."""
        if self.routes.owner(message.request_id) in (router, b""):
            return True
        self._master.transport.num_refused += 1
        if router not in self._foreign:
            self._foreign.add(router)
            _log.error(
                "router_speaks_for_another",
                peer=self._name_of(router),
                request_id=message.request_id,
                message=type(message).__name__,
            )
        return False

    def _name_of(self, router: bytes) -> str:
        """Of the connection's key; "": it has none."""
        peer = self._socket.peer(router)
        return peer.name if peer is not None else ""

    # -- probes --------------------------------------------------------------------------------

    def _probe(self, router: bytes, message: ProbeInstance) -> None:
        workers = self._master.workers
        if not workers.is_ready:
            self._send(router, ProbeAnswer(message.nonce, False))
            return
        if workers.shows_work:
            # A ping would wait for the step: its progress is the better proof.
            self._send(router, ProbeAnswer(message.nonce, True, workers.age_ms))
            return
        self._num_probes += 1
        nonce = self._num_probes
        self._probes[nonce] = (router, message.nonce)
        self._master.later(PROBE_S, self.answer_probe, nonce, False)
        workers.ping(nonce)

    def answer_probe(self, nonce: int, ok: bool) -> None:
        """A probe's ping was answered, or will not be. Answered ones are ignored."""
        asked = self._probes.pop(nonce, None)
        if asked is not None:
            router, theirs = asked
            self._send(router, ProbeAnswer(theirs, ok, self._master.workers.age_ms))

    def fail_probes(self) -> None:
        """No open probe will be answered: the worker is gone."""
        for nonce in tuple(self._probes):
            self.answer_probe(nonce, False)

    # -- lost connections ----------------------------------------------------------------------

    def _on_gone(self, router: bytes) -> None:
        self._voids.pop(router, None)
        self._foreign.discard(router)
        self.commands.gone(router)
        orphans = self.routes.owned_by(router)
        if orphans:
            _log.warning("router_gone", num_requests=len(orphans))
            self._master.later(ORPHAN_S, self._abort, orphans)

    def _abort(self, requests: list[tuple[str, int]]) -> None:
        """End attempts that nobody waits for; those that were replaced meanwhile go on."""
        scheduler = self._master.scheduler
        for request_id, attempt in requests:
            if self.routes.attempt(request_id) != attempt:
                continue
            self.routes.remove(request_id)
            if scheduler is not None:
                self._master.steps.call(scheduler.cancel, request_id, attempt)
        self._master.steps.pump()
