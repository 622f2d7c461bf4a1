"""Where requests run: which instance may take one, and the counts of those that are there.

Knows the view, the policy and the links; the states of requests say what they want. Invariant:
`request.placed` names the instance among whose requests the view counts it, or nothing.
"""

from __future__ import annotations

from xllm.errors import OverloadedError, UnavailableError
from xllm.protocol.instance import AdmitRequest
from xllm.router.inflight import InflightRequest, InstanceLinks
from xllm.router.policy import Policy, Stages
from xllm.router.state.instructions import SendTo
from xllm.router.state.request import RequestLife
from xllm.router.view import ClusterView


class Placement:
    """Chooses instances and sends words to them."""

    def __init__(self, view: ClusterView, policy: Policy, links: InstanceLinks) -> None:
        self._view = view
        self._policy = policy
        self._links = links

    def choose(self, state: RequestLife) -> Stages | None:
        """The route of a request's next attempt, or None where nobody may take it now."""
        usable = self._view.usable(state.spec.model)
        avoid = state.moves.avoid
        if avoid:
            usable = tuple(one for one in usable if one.name not in avoid)
        return self._policy.choose(usable, len(state.spec.prompt_ids)) if usable else None

    def send(self, request: InflightRequest, one: SendTo) -> str:
        """Send a word of a request. Returns "", or the code of why an attempt did not reach its
        instance; that of other words does not matter."""
        reached = self._links.send(one.instance, one.message)
        if type(one.message) is not AdmitRequest:
            return ""
        request.placed = one.instance
        self._view.placed(one.instance)
        if reached:
            return ""
        known = self._view.get(one.instance)
        # A connection that stands and takes nothing is full of what was sent before.
        full = known is not None and known.connected
        return OverloadedError.code if full else UnavailableError.code

    def leave(self, request: InflightRequest) -> None:
        """The request runs nowhere from now on."""
        if request.placed:
            self._view.left(request.placed)
            request.placed = ""

    def refused(self, request: InflightRequest) -> None:
        """Its instance takes no requests at present."""
        self._view.refused(request.placed)

    def deserted(self) -> list[str]:
        """Silent instances whose requests have a better place to go to."""
        return [
            one.name
            for one in self._view
            if one.suspect and one.num_inflight and self._view.usable(one.record.model)
        ]
