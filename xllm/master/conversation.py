"""The conversation with routers: what each message asks of the master, and where answers go.

Holds the connections' requests (`routes`), the role under its epoch, and open probes. Knows
nothing of steps. A connection that is lost has its requests aborted after a second, unless a
higher attempt of them came by another one meanwhile.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import structlog

from xllm.errors import BackpressureError, BrokenError, UnavailableError
from xllm.master.outcome import StepOutcome
from xllm.master.routes import RequestRoutes
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import (
    AdmitRequest,
    AssignRole,
    CancelRequest,
    Drained,
    DrainInstance,
    EpochRefused,
    FrameRefused,
    InstanceRequest,
    ProbeAnswer,
    ProbeInstance,
    QuerySnapshot,
    RequestEnded,
    TokenBatch,
)
from xllm.protocol.transport.router import RouterSocket

if TYPE_CHECKING:
    from xllm.master.actor import MasterActor

_log = structlog.get_logger("routers")

ORPHAN_S = 1.0
"""How long the requests of a lost connection run on."""
PROBE_S = 5.0


class RouterConversation:
    """Lives inside the master's actor."""

    def __init__(self, master: MasterActor, endpoint: str) -> None:
        self._master = master
        self.routes = RequestRoutes()
        self.role = "both"
        self.highest_epoch = 0
        self._probes: dict[int, tuple[bytes, int]] = {}
        self._num_probes = 0
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
        self._socket.close()

    def route(self, outcome: StepOutcome) -> None:
        """Send an outcome, one batch a router."""
        for router, batch in self.routes.split(outcome):
            self._send(router, batch)

    def _send(self, router: bytes, message: msgspec.Struct) -> None:
        try:
            self._socket.send(router, message)
        except BrokenError:
            pass  # it is gone: `_on_gone` ends its requests
        except BackpressureError:
            # A router that does not read has lost tokens by now: its requests are void.
            _log.warning("router_does_not_read", num_requests=len(self.routes.owned_by(router)))
            self._abort(self.routes.owned_by(router))

    # -- messages ------------------------------------------------------------------------------

    def _on_message(self, router: bytes, message: InstanceRequest, frames: list[bytes]) -> None:
        if isinstance(message, AdmitRequest):
            self._admit(router, message)
        elif isinstance(message, CancelRequest):
            self._cancel(message)
        elif isinstance(message, ProbeInstance):
            self._probe(router, message)
        elif isinstance(message, QuerySnapshot):
            self._send(router, self._master.snapshot())
        elif isinstance(message, AssignRole):
            if self._is_current(router, message.epoch):
                _log.info("role_assigned", role=message.role, epoch=message.epoch)
                self.role = message.role
                self._master.beat()
        elif isinstance(message, DrainInstance) and self._is_current(router, message.epoch):
            self._master.begin_drain()
            self._master.spawn(self._drain(router, message.timeout_ms / 1000))
        # ReleaseHold: nothing is ever held here yet, so that there is nothing to release.

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
        else:
            refusal = scheduler.admit(message, time.monotonic())
        if refusal is not None:
            master.metrics.num_refused += 1
            self._send(router, TokenBatch(ended=(refusal,)))
            return
        if message.attempt > self.routes.attempt(message.request_id):
            master.metrics.num_admitted += 1
            self.routes.add(message.request_id, message.attempt, router)
        master.steps.pump()

    def _cancel(self, message: CancelRequest) -> None:
        scheduler = self._master.scheduler
        if scheduler is None or message.attempt < self.routes.attempt(message.request_id):
            return
        scheduler.cancel(message.request_id, message.attempt, message.choice)
        if message.choice < 0:
            self.routes.remove(message.request_id)
        self._master.steps.pump()

    def _is_current(self, router: bytes, epoch: int) -> bool:
        if epoch < self.highest_epoch:
            self._send(router, EpochRefused(epoch, self.highest_epoch))
            return False
        self.highest_epoch = epoch
        return True

    async def _drain(self, router: bytes, timeout_s: float) -> None:
        num_aborted = await self._master.drain(timeout_s)
        self._send(router, Drained(num_aborted))

    # -- probes --------------------------------------------------------------------------------

    def _probe(self, router: bytes, message: ProbeInstance) -> None:
        if not self._master.workers.is_ready:
            self._send(router, ProbeAnswer(message.nonce, False))
            return
        self._num_probes += 1
        nonce = self._num_probes
        self._probes[nonce] = (router, message.nonce)
        self._master.later(PROBE_S, self.answer_probe, nonce, False)
        self._master.workers.ping(nonce)

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
                scheduler.cancel(request_id, attempt)
        self._master.steps.pump()
