"""How an instance is chosen: small interchangeable decisions over the view.

Pure. A policy answers with stages [(role, instance), ...], at present one of role `both`; it
never sees an instance that is not usable, and is never asked without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm.errors import ConfigError
from xllm.router.view import InstanceView

Stages = tuple[tuple[str, str], ...]


class Policy(Protocol):
    """Chooses a route."""

    def choose(self, candidates: Sequence[InstanceView], num_prompt_tokens: int) -> Stages:
        """The route of a request with a prompt of that length; `candidates` is not empty."""
        ...


class LeastLoad:
    """The instance with the fewest requests; of equals, the one that was chosen least lately.

    Requests: those of this router that run there, or what the last heartbeat counted, whichever
    is more (a heartbeat is late, but counts other routers' requests)."""

    def __init__(self) -> None:
        self._chosen: dict[str, int] = {}
        self._count = 0

    def choose(self, candidates: Sequence[InstanceView], num_prompt_tokens: int) -> Stages:
        """The least loaded."""
        if len(candidates) == 1:
            return (("both", candidates[0].name),)
        best = min(candidates, key=self._cost)
        self._count += 1
        self._chosen[best.name] = self._count
        return (("both", best.name),)

    def _cost(self, one: InstanceView) -> tuple[int, int]:
        load = one.load
        num_requests = max(one.num_inflight, load.num_waiting + load.num_running)
        return num_requests, self._chosen.get(one.name, 0)


class RoundRobin:
    """Each instance in turn, whatever it does."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, candidates: Sequence[InstanceView], num_prompt_tokens: int) -> Stages:
        """The next by name after the one chosen last."""
        names = sorted(one.name for one in candidates)
        name = next((name for name in names if name > self._last), names[0])
        self._last = name
        return (("both", name),)


def make_policy(name: str) -> Policy:
    """The policy of that name (router.policy)."""
    if name == "least-load":
        return LeastLoad()
    if name == "round-robin":
        return RoundRobin()
    raise ConfigError(f"no policy is named {name}", param="router.policy")
