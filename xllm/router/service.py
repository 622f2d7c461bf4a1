"""The facade that both front ends call: requests, questions, health and figures.

Knows neither HTTP nor sockets. Invariant: each submitted request gets exactly one terminal
message, whatever happens.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog
from prometheus_client import CollectorRegistry, generate_latest

from xllm import __version__
from xllm.config.settings import Settings
from xllm.errors import RequestAbortedError, UnavailableError
from xllm.protocol.administration import SetObjectives, SetRole
from xllm.protocol.bus import BusMessage, DaemonHeartbeat, InstanceHeartbeat, RouterPresence
from xllm.protocol.client import RouterMessage
from xllm.protocol.generation import SubmitRequest
from xllm.protocol.instance import (
    HeldTokens,
    InstanceReply,
    ProbeAnswer,
    RequestEnded,
    SleepSet,
    TokenBatch,
)
from xllm.protocol.questions import (
    DetokenizedText,
    DetokenizeIds,
    HealthReport,
    ModelInfo,
    StatusReport,
    TokenizedText,
    TokenizeText,
)
from xllm.protocol.records import InstanceRecord
from xllm.router.admission.breaker import CircuitBreakers
from xllm.router.admission.control import AdmissionControl
from xllm.router.decision_metrics import DecisionMetrics
from xllm.router.dispatcher import Dispatcher
from xllm.router.front import Sink, Tenant
from xllm.router.inflight import InflightRequest, InstanceLinks
from xllm.router.kv_feed import KvFeed
from xllm.router.kv_metrics import KvFeedMetrics
from xllm.router.leadership.objectives import LiveObjectives
from xllm.router.metrics import RouterMetrics
from xllm.router.models import ServedModels
from xllm.router.placement import Placement
from xllm.router.policies.make import make_policy, reads_cache
from xllm.router.policies.question import Policy, RouteFigures
from xllm.router.probe import Prober
from xllm.router.recall import Recall, Recaller
from xllm.router.remembered import RememberedFigures
from xllm.router.report import degraded_parts, merged_metrics, process_list
from xllm.router.sleeping import SleepSetter
from xllm.router.state.instructions import Instruction
from xllm.router.state.request import RequestLife
from xllm.router.submission import Submission
from xllm.router.text.model import TextModel
from xllm.router.text.pool import TextPool
from xllm.router.text_work import TextWork
from xllm.router.view import ClusterView, ViewChange

_log = structlog.get_logger("router")
LeaderCommand = Callable[[SetRole | SetObjectives], Awaitable[RouterMessage]]
STALL_S = 1.0
"""A loop that has not turned for so long serves nobody in time."""


class RouterService:
    """All methods are called on the event loop's thread."""

    def __init__(
        self,
        settings: Settings,
        model_name: str,
        text: TextModel,
        links: InstanceLinks,
        *,
        name: str = "router",
        incarnation: str = "",
        more: Mapping[str, TextModel] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`model_name` and `text`: the first model's; `more`: those of further ones."""
        self._name = name
        self._incarnation = incarnation
        self._clock = clock
        self.view = ClusterView(settings.cluster.heartbeat_s)
        texts = {model_name: text, **(more or {})}
        self.served = ServedModels(texts, settings.router, self.view)
        self.registry = CollectorRegistry()
        """The router's own metrics; front ends add theirs here."""
        self.metrics = RouterMetrics(self.registry, lambda: self.num_open)
        RememberedFigures(self.registry, self.served)
        routes = RouteFigures()
        policy = make_policy(settings.router.policy, settings.routing, routes)
        limits = settings.admission
        self.kv = self._feed(settings, clock)
        """What is cached where."""
        self.placement = self._place(settings, policy, routes, links)
        self.dispatcher = Dispatcher(self.placement, links, self.metrics, clock)
        self.admission = AdmissionControl(
            limits,
            self.placement.has_room,
            self.placement.expects,
            self._start,
            self.dispatcher.fail,
            clock,
        )
        self.dispatcher.door = self.admission
        DecisionMetrics(self.registry, self.view, self.placement, self.admission, clock)
        self.prober = Prober(lambda instance, message: _ignore(links.send(instance, message)))
        self.recaller = Recaller(self.view, links.send, self.metrics)
        self.sleeping = SleepSetter(self.served, self.view, links.send)
        self._pool = TextPool()
        self.texts = TextWork(self.served, self._pool)
        """Encodes and decodes as a part of what is counted already."""
        self.objectives = LiveObjectives()
        self.leader_command: LeaderCommand = _cannot_lead
        """Carries out what only a leader may; the part that may lead puts its own here."""
        self.complaints: list[Callable[[], tuple[str, ...]]] = [self.kv.alarms]
        """What further parts find amiss, for health reports."""
        self._ticked_at = 0.0
        self.event_keys: tuple[bytes, ...] = (os.urandom(32),)
        """Of ids of events of HTTP streams: signed with the first, verified with each; the actor
        sets the cluster's."""
        self.registry_degraded = False
        """Set by the actor: the registry does not answer."""
        self.submission = self._take_in(settings)

    def _place(
        self, settings: Settings, policy: Policy, routes: RouteFigures, links: InstanceLinks
    ) -> Placement:
        limits = settings.admission
        breakers = CircuitBreakers(
            limits.breaker_failures, limits.breaker_window_s, limits.breaker_open_s
        )
        return Placement(
            self.view,
            policy,
            links,
            self._clock,
            figures=routes,
            source=self.kv if reads_cache(settings.router.policy) else None,
            breakers=breakers,
            most_waiting=limits.instance_waiting,
        )

    def _take_in(self, settings: Settings) -> Submission:
        return Submission(
            self.served,
            self._pool,
            self.dispatcher,
            settings.router,
            self.admission,
            self.recaller,
            self._clock,
        )

    def _feed(self, settings: Settings, clock: Callable[[], float]) -> KvFeed:
        feed = KvFeed(settings.kv_index, clock)
        KvFeedMetrics(self.registry, feed)
        return feed

    def _start(
        self, request: InflightRequest, state: RequestLife, instructions: Sequence[Instruction]
    ) -> None:
        request.state = state
        self.dispatcher.start(request, instructions)

    # -- requests ----------------------------------------------------------------------------

    def submit(
        self,
        request: SubmitRequest,
        tenant: Tenant,
        sink: Sink,
        borders: Sequence[int] = (),
        recall: Recall | None = None,
    ) -> str:
        """Start a request and return the server's id of it (128 random bits, hex). `borders`: for
        each choice, behind how many tokens a delta must end; 0: wherever it does. `recall`: an
        earlier life of it, of which instances may have the first tokens; they are asked once it is
        let in.

        Never raises for a fault of the request: `sink` gets deltas (where `request.stream`; the
        last one of each choice has its `finish_reason`), then exactly one RequestFinished or
        RequestFailed, possibly before this returns."""
        filled = self.objectives.fill(request)
        return self.submission.submit(filled, tenant, sink, borders, recall)

    def abort(self, request_id: str) -> None:
        """Stop a request: its sink gets RequestFailed with code `aborted`. Unknown: ignored."""
        self.dispatcher.abort(request_id, RequestAbortedError.code, "aborted by its client")

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self.submission.draining

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new, let open requests end for so long, then fail the rest; returns how
        many those were."""
        self.submission.draining = True
        try:
            await asyncio.wait_for(self.dispatcher.wait_empty(), timeout_s)
        except TimeoutError:
            pass  # the rest is told below
        rest = list(self.dispatcher.open)
        for request_id in rest:
            self.dispatcher.abort(request_id, RequestAbortedError.code, "the router stops")
        return len(rest)

    def close(self) -> None:
        """Stop timers and threads."""
        self.dispatcher.close()
        self.prober.close()
        self._pool.close()

    # -- what the actor hears ----------------------------------------------------------------

    def instance_says(self, name: str, message: InstanceReply) -> None:
        """A message of an instance."""
        if isinstance(message, TokenBatch):
            for ended in message.ended:
                self._found(name, ended)
            self.dispatcher.batch(name, message)
        elif isinstance(message, ProbeAnswer):
            self.prober.answered(name, message)
        elif isinstance(message, HeldTokens):
            self.recaller.answered(name, message)
        elif isinstance(message, SleepSet):
            self.sleeping.answered(name, message)
        else:
            _log.warning("unexpected_word", instance=name, word=type(message).__name__)

    def _found(self, name: str, ended: RequestEnded) -> None:
        """Tell the index what a request found cached; a vector's prompt is computed by itself."""
        request = self.dispatcher.open.get(ended.request_id)
        state = request.state if request is not None else None
        if state is None or ended.code or ended.attempt != state.attempt or state.spec.embed:
            return
        if state.instance != name:
            return  # it does not run there: the dispatcher counts that
        self.kv.ended(name, ended, len(state.spec.prompt_ids))

    def registered(self, record: InstanceRecord) -> ViewChange:
        """An instance's record was written; what that changed is for `dispatcher.changed`."""
        self.served.learn(record)
        return self.view.registered(record, self._clock())

    def heard(self, word: BusMessage) -> ViewChange:
        """A heartbeat; what that changed is for `dispatcher.changed`."""
        if isinstance(word, InstanceHeartbeat):
            change = self.view.heartbeat(word, self._clock())
            self.placement.traffic.heartbeat(word, self._clock())
            return change
        if isinstance(word, DaemonHeartbeat):
            self.view.daemon_heartbeat(word, self._clock())
        elif isinstance(word, RouterPresence) and self.view.router_presence(word, self._clock()):
            self.placement.traffic.presence(word, self._clock())
            self.admission.heard(word)
        return ViewChange()

    def tick(self) -> ViewChange:
        """Several times a second; what that changed is for `dispatcher.changed`."""
        now = self._ticked_at = self._clock()
        self.metrics.registry_degraded = self.registry_degraded
        self.dispatcher.tick(now)
        self.admission.tick()
        self.placement.tick(now)
        return self.view.tick(now)

    # -- questions ---------------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        """The models served here, ready or not."""
        return tuple(one.info(bool(self.view.usable(one.name))) for one in self.served)

    async def tokenize(self, request: TokenizeText, tenant: Tenant) -> TokenizedText:
        """Token ids of a text or of messages; XllmError where it cannot. It counts as a request
        of the tenant."""
        with self.admission.question(tenant.account or tenant.name):
            return await self.texts.encode(request, tenant)

    async def detokenize(self, request: DetokenizeIds, tenant: Tenant) -> DetokenizedText:
        """The text of token ids; XllmError where it cannot. It counts as a request."""
        with self.admission.question(tenant.account or tenant.name):
            return await self.texts.decode(request, tenant)

    def token_bytes(self, model: str, token_id: int) -> bytes:
        """The bytes that a token stands for (special tokens: their name), for logprobs."""
        return self.served.find(model).text.token_bytes(token_id)

    async def health(self, probe: bool) -> HealthReport:
        """`live`: this process works. `ready`: an instance of each model that is awake is, and
        this loop turns; with `probe`, one answered through its worker within 1 s."""
        usable = self.served.usable_instances()
        stood_s = self._clock() - self._ticked_at if self._ticked_at else 0.0
        ready = self.served.are_ready() and not self.draining and stood_s < STALL_S
        if ready and probe:
            ready = await self.prober.probe(usable)
        now = self._clock()
        degraded = degraded_parts(self.view, self.registry_degraded, self.draining, now)
        degraded += tuple(
            f"no instance of {one} is ready" for one in self.served.without_instance()
        )
        if stood_s >= STALL_S:
            degraded += (f"this router's loop stood still for {stood_s:.1f} s",)
        for complain in self.complaints:
            degraded += complain()
        if usable and probe and not ready and not self.draining:
            degraded = (*degraded, "no instance answered within 1 s")
        return HealthReport(id=0, live=True, ready=ready, degraded=degraded, version=__version__)

    def status(self) -> StatusReport:
        """The router's view of the cluster."""
        now = self._clock()
        num_waiting = self.admission.num_waiting
        num_running = self.num_open - num_waiting
        own = (self._name, self._incarnation, self.draining, num_waiting, num_running)
        breakers = self.placement.breakers
        found = process_list(self.view, own, now, lambda name: breakers.state(name, now))
        return StatusReport(id=0, processes=found)

    def metrics_text(self) -> bytes:
        """Prometheus text of all processes, labelled by role and instance."""
        return merged_metrics(self.view, self._name, generate_latest(self.registry))

    @property
    def num_open(self) -> int:
        """Requests without a terminal message."""
        return len(self.dispatcher.open)


def _ignore(reached: bool) -> None:
    """A probe that cannot be sent is a probe without an answer."""


async def _cannot_lead(message: SetRole | SetObjectives) -> RouterMessage:
    raise UnavailableError("this router does not lead: it has not run for it yet")
