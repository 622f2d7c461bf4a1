"""From a submitted request to its first instructions: checks, then the work on its text.

Short work is done at once, long work in a thread; either way the request is in the table of open
requests from the first moment, so that it can be aborted and its time runs. Invariant: a submit
that fails here, for whatever reason, gives its sink exactly one RequestFailed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from xllm.config.router import RouterSettings
from xllm.errors import (
    ConflictError,
    OverloadedError,
    RequestAbortedError,
    UnavailableError,
    XllmError,
)
from xllm.protocol.generation import RequestFailed, SubmitRequest, next_life
from xllm.protocol.transport.context import describe_error
from xllm.router.admission.control import AdmissionControl
from xllm.router.dispatcher import Dispatcher
from xllm.router.drawing import RandomBytes
from xllm.router.effort import LONG_IDS, is_long_request
from xllm.router.front import Sink, Tenant
from xllm.router.inflight import InflightRequest
from xllm.router.intake import Intake
from xllm.router.models import ServedModels
from xllm.router.recall import Recall, Recaller
from xllm.router.state.instructions import Instruction, Wish
from xllm.router.state.request import RequestLife
from xllm.router.text.pool import TextPool

_log = structlog.get_logger("router")
_PLACE: tuple[Instruction, ...] = (Wish.PLACE,)
Beginning = tuple[RequestLife, Sequence[Instruction]]
"""A request's state and what it wants first."""


class Submission:
    """Takes requests in."""

    def __init__(
        self,
        served: ServedModels,
        pool: TextPool,
        dispatcher: Dispatcher,
        limits: RouterSettings,
        admission: AdmissionControl,
        recaller: Recaller,
        clock: Callable[[], float],
    ) -> None:
        self._served = served
        self._pool = pool
        self._dispatcher = dispatcher
        self._limits = limits
        self._admission = admission
        self._recaller = recaller
        self._clock = clock
        self._random = RandomBytes()
        self.draining = False
        """Refuse whatever comes."""

    def submit(
        self,
        request: SubmitRequest,
        tenant: Tenant,
        sink: Sink,
        borders: Sequence[int] = (),
        recall: Recall | None = None,
    ) -> str:
        """See RouterService.submit."""
        drawn = self._random.take(24)
        request_id = drawn[:16].hex()
        if request.key:
            request_id = bound_id(request.key, tenant)
            if not self._make_way(request_id, request):
                sink.send(
                    RequestFailed(
                        id=request.id,
                        code=ConflictError.code,
                        message="a request with this key is open, and not under a lower attempt",
                        request_id=request_id,
                        param="key",
                    )
                )
                return request_id
        seed = int.from_bytes(drawn[16:], "little")
        now = self._clock()
        time_s = request.timeout_ms / 1000 if request.timeout_ms > 0 else self._limits.timeout_s
        deadline = now + min(time_s, self._limits.timeout_s)
        opened = InflightRequest(request.id, sink, now, deadline)
        if request.resume is not None:
            opened.resumes(request.resume)
        self._dispatcher.enter(request_id, opened)
        try:
            self._check_room()
            self._admission.arrive(opened, tenant.account or tenant.name)
            intake = self._served.find(request.model)
            packed = intake.check(request)
            self._served.check_awake(intake.name)
            is_long = is_long_request(request)
            if is_long or recall is not None:
                rank = (not request.offline, request.priority)
                self._admission.foresee(opened, intake.name, tenant.name, rank)
            asked = intake, request, tenant, request_id, seed, deadline, packed, borders
            if is_long:
                begun = self._pool.run(tenant.name, partial(self._begin, *asked))
                self._later(opened, request_id, begun, partial(self._start, opened, recall))
            else:
                self._start(opened, recall, self._begin(*asked))
        except Exception as error:
            self._refuse(request_id, opened, error)
        return request_id

    def _make_way(self, request_id: str, request: SubmitRequest) -> bool:
        """Whether the id is free, or was that of an earlier life of this request, which ends: its
        client came back before its first connection was found lost."""
        known = self._dispatcher.open.get(request_id)
        if known is None:
            return True
        attempt = known.life if known.state is None else known.state.attempt
        if request.resume is None or next_life(request.resume.attempt) <= attempt:
            return False
        text = "its client goes on with it over another connection"
        self._dispatcher.abort(request_id, RequestAbortedError.code, text)
        return True

    def _check_room(self) -> None:
        if self.draining:
            raise UnavailableError("this router is about to stop")
        if len(self._dispatcher.open) > self._limits.max_inflight:
            raise OverloadedError(
                f"{self._limits.max_inflight} requests are open (router.max_inflight)"
            )

    def _begin(
        self,
        intake: Intake,
        request: SubmitRequest,
        tenant: Tenant,
        request_id: str,
        seed: int,
        deadline: float,
        packed: bytes,
        borders: Sequence[int],
    ) -> Beginning:
        """The dear part: no part of it touches what other requests have, save caches."""
        spec = intake.prepare(request, tenant, request_id, seed, deadline, packed)
        text = intake.text
        sampling, prompt_ids = spec.sampling, spec.prompt_ids
        state = RequestLife(spec, [text.output(sampling, prompt_ids) for _ in range(sampling.n)])
        if borders:
            for choice, border in zip(state.choices, borders, strict=False):
                choice.border = border
        return state, _PLACE if request.resume is None else state.resume(request.resume)

    def _start(self, opened: InflightRequest, recall: Recall | None, beginning: Beginning) -> None:
        state, instructions = beginning
        self._admission.spend(opened, len(state.spec.prompt_ids))
        if recall is None:
            self._admission.enter(opened, state, instructions)
        else:
            asked = asyncio.ensure_future(self._recall(opened, state, recall))
            self._later(opened, state.spec.request_id, asked, partial(self._enter, opened))

    def _enter(self, opened: InflightRequest, beginning: Beginning) -> None:
        self._admission.enter(opened, *beginning)

    async def _recall(
        self, opened: InflightRequest, state: RequestLife, recall: Recall
    ) -> Beginning:
        """Let a request go on behind the tokens that instances have of its earlier life."""
        known = await self._recaller.recall(state.spec.model, recall)
        opened.num_held = sum(map(len, known))
        if opened.num_held > LONG_IDS:
            taken = self._pool.run(state.spec.tenant, partial(state.recall, known))
            return state, await taken
        return state, state.recall(known) if known else _PLACE

    def _later(
        self,
        opened: InflightRequest,
        request_id: str,
        beginning: asyncio.Future[Beginning],
        go_on: Callable[[Beginning], None],
    ) -> None:
        """Go on once that is there; the request may be ended until then."""
        opened.encoding = beginning
        beginning.add_done_callback(partial(self._begun, request_id, opened, go_on))

    def _begun(
        self,
        request_id: str,
        opened: InflightRequest,
        go_on: Callable[[Beginning], None],
        done: asyncio.Future[Beginning],
    ) -> None:
        if done.cancelled():
            return  # it was ended meanwhile, or the pool was closed
        opened.encoding = None
        try:
            beginning = done.result()
            if self._dispatcher.open.get(request_id) is opened:
                go_on(beginning)
        except Exception as error:
            self._refuse(request_id, opened, error)

    def _refuse(self, request_id: str, opened: InflightRequest, error: Exception) -> None:
        """The request's own fault, or ours: its sink is told, nobody else notices."""
        if not isinstance(error, XllmError):
            _log.error("submit_failed", request_id=request_id, error=describe_error(error))
            error = XllmError("an internal error; the log of the router has it")
        if self._dispatcher.open.get(request_id) is not opened:
            return
        if opened.state is not None:
            self._dispatcher.abort(request_id, error.code, error.message)
            return
        retry_s = error.retry_after_s if isinstance(error, OverloadedError) else 1.0
        failed = RequestFailed(
            id=opened.client_id,
            code=error.code,
            message=error.message,
            request_id=request_id,
            param=error.param,
            retry_after_ms=int(retry_s * 1000)
            if isinstance(error, OverloadedError | UnavailableError)
            else 0,
            everywhere=isinstance(error, UnavailableError) and error.everywhere,
        )
        self._dispatcher.fail(request_id, opened, failed)


def bound_id(key: str, tenant: Tenant) -> str:
    """The server's id of a request whose client drew a key for it: the same at every router of
    the cluster, and another one for every tenant."""
    salt = len(tenant.salt).to_bytes(8, "little") + tenant.salt
    return hashlib.sha256(b"xllm request id v1" + salt + key.encode()).hexdigest()[:32]
