"""Where requests run: which instance may take one, and the counts of those that are there.

Knows the view, the policy and the links; the states of requests say what they want. Invariant:
`request.placed` names the instance among whose requests the view counts it, or nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from xllm.errors import OverloadedError, UnavailableError, WorkerLostError
from xllm.protocol.instance import AdmitRequest, RequestEnded
from xllm.router.admission.breaker import CircuitBreakers
from xllm.router.inflight import InflightRequest, InstanceLinks
from xllm.router.policies.load import takes_more
from xllm.router.policies.question import (
    CachedTiers,
    Policy,
    PrefixSource,
    RouteFigures,
    RouteQuestion,
    Stages,
)
from xllm.router.process_views import InstanceView
from xllm.router.state.instructions import SendTo
from xllm.router.state.request import RequestLife
from xllm.router.traffic import Traffic
from xllm.router.view import ClusterView

WHOLE = "both"
"""The role of an instance that runs requests from their prompt to their end."""
_NOT_NOW = (UnavailableError.code, WorkerLostError.code)
"""What an instance ends requests with that takes none at present."""


class Placement:
    """Chooses instances and sends words to them. `source`: who knows what is cached where;
    `most_waiting`: an instance where so many requests wait gets another only if all have."""

    def __init__(
        self,
        view: ClusterView,
        policy: Policy,
        links: InstanceLinks,
        clock: Callable[[], float],
        *,
        figures: RouteFigures | None = None,
        source: PrefixSource | None = None,
        breakers: CircuitBreakers | None = None,
        most_waiting: int = 0,
    ) -> None:
        self._view = view
        self._policy = policy
        self._links = links
        self._clock = clock
        self._source = source
        self._most_waiting = most_waiting
        self.breakers = breakers or CircuitBreakers(0, 1.0, 1.0)
        self.figures = figures or RouteFigures()
        self.traffic = Traffic(view)
        self._suspects: dict[str, RequestLife] = {}
        """Requests that were sent somewhere to run alone."""
        self._planned = ("", 0)
        """The request that was placed last, and its prompt tokens to compute there."""

    def choose(self, state: RequestLife) -> Stages | None:
        """The route of a request's next attempt, or None where nobody may take it now."""
        usable: Sequence[InstanceView] = self._view.usable(state.spec.model)
        avoid = state.moves.avoid
        if avoid:
            usable = [one for one in usable if one.name not in avoid]
        if not usable:
            return None
        usable = for_whole(usable)
        if len(usable) > 1:
            usable = self.breakers.passable(usable, self._clock())
            most = self._bound(state.spec.offline)
            usable = [one for one in usable if takes_more(one, most)] or usable
            if state.is_suspect:
                usable = for_suspects(usable, state.moves.died_at, self._num_suspects())
        ask = self._question(state, usable)
        stages = self._policy.choose(usable, ask)
        held = ask.cached.get(stages[0][1])
        num_cached = 0 if held is None else held.device * ask.block_size
        if self._source is not None:
            num_blocks = num_cached // ask.block_size
            self._source.placed(state.spec.request_id, stages[0][1], num_blocks)
        self._planned = (state.spec.request_id, max(1, ask.num_prompt_tokens - num_cached))
        return stages

    def has_room(self, model: str, offline: bool) -> bool | None:
        """Whether an instance takes one more request; None: none is usable."""
        usable = self._view.usable(model)
        if not usable:
            return None
        most = self._bound(offline)
        for one in self.breakers.passable(for_whole(usable), self._clock()):
            if takes_more(one, most):
                return True
        return False

    def expects(self, model: str, now: float, grace_s: float) -> bool:
        """Whether an instance of a model may soon take requests: it was listed less than `grace_s`
        ago, and is not both connected and heard of yet."""
        return any(
            one.expected and one.record.model == model and now - one.listed_at < grace_s
            for one in self._view
        )

    def _num_suspects(self) -> Counter[str]:
        """How many requests of this router run alone, by instance."""
        return Counter(one.instance for one in self._suspects.values() if one.is_suspect)

    def _bound(self, offline: bool) -> int:
        """Half is for online requests alone."""
        most = self._most_waiting
        return max(1, most // 2) if offline and most else most

    def _question(self, state: RequestLife, usable: Sequence[InstanceView]) -> RouteQuestion:
        spec = state.spec
        block_size = usable[0].record.block_size
        num_tokens = len(spec.prompt_ids)
        if state.attempt > 1:
            num_tokens += sum(len(choice.ids) for choice in state.choices)
        cached: Mapping[str, CachedTiers] = {}
        if self._source is not None and spec.block_hashes:
            cached = self._source.match(spec.model, spec.block_hashes)
            self.figures.prompt_blocks += len(spec.prompt_ids) // block_size
        return RouteQuestion(num_tokens, block_size, cached, spec.session, spec.tenant)

    def send(self, request: InflightRequest, one: SendTo) -> str:
        """Send a word of a request. Returns "", or the code of why an attempt did not reach its
        instance; that of other words does not matter."""
        reached = self._links.send(one.instance, one.message)
        if type(one.message) is not AdmitRequest:
            return ""
        request.placed = one.instance
        planned, num_tokens = self._planned
        if planned != one.message.request_id:
            num_tokens = len(one.message.prompt_ids)
        now = self._clock()
        self.traffic.placed(one.instance, num_tokens, now)
        if one.message.alone and request.state is not None:
            self._suspects[one.message.request_id] = request.state
        if reached:
            self.breakers.sent(one.instance, one.message.request_id, now)
            return ""
        known = self._view.get(one.instance)
        if known is None or not known.connected:
            return UnavailableError.code
        # A connection that stands and takes nothing is full of what was sent before.
        self.traffic.refused(one.instance)
        return OverloadedError.code

    def answers(self, request: InflightRequest) -> None:
        """Tokens of a request's present attempt came."""
        if request.state is not None:
            self.breakers.answers(request.placed, request.state.spec.request_id)

    def leave(self, request: InflightRequest) -> None:
        """The request runs nowhere from now on."""
        if request.placed:
            if request.state is not None:
                self.breakers.left(request.placed, request.state.spec.request_id)
                self._suspects.pop(request.state.spec.request_id, None)
            self.traffic.left(request.placed)
            request.placed = ""

    def ended(self, request: InflightRequest, word: RequestEnded) -> None:
        """Its instance ended the present attempt."""
        name, code = request.placed, word.code
        self.breakers.ended(name, word.request_id, code, self._clock())
        if code in _NOT_NOW:
            self._view.refused(name)
        elif code == OverloadedError.code:
            self.traffic.refused(name)

    def died(self, name: str) -> None:
        """An instance was lost: a fault of it, if it was in the midst of its work."""
        known = self._view.get(name)
        if known is not None and known.num_inflight:
            self.breakers.died(name, self._clock())

    def tick(self, now: float) -> None:
        """Call now and then: what is long past is forgotten."""
        self.traffic.forget(now)
        self.breakers.forget(now)

    def deserted(self) -> list[str]:
        """Silent instances whose requests have a better place to go to."""
        return [
            one.name
            for one in self._view
            if one.suspect and one.num_inflight and self._view.usable(one.record.model)
        ]


def for_suspects(
    usable: Sequence[InstanceView], died_at: frozenset[str], num_suspects: Mapping[str, int]
) -> list[InstanceView]:
    """Those for a request under which instances died: where the fewest of its kind are, which take
    turns there; of these, if one is back, where it died already, which have little to lose."""

    def rank(one: InstanceView) -> tuple[int, bool]:
        return num_suspects.get(one.name, 0), one.name not in died_at

    best = min(map(rank, usable))
    return [one for one in usable if rank(one) == best]


def for_whole(usable: Sequence[InstanceView]) -> Sequence[InstanceView]:
    """Those that whole requests go to: of the role `both`, or all where none has it."""
    for one in usable:
        if one.role != WHOLE:
            break
    else:
        return usable
    return [one for one in usable if one.role == WHOLE] or usable
