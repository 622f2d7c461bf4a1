"""The routers that a client may speak with: those that it was given, and those that they name.

Pure. Invariant: a client that was given addresses of other machines is never led to its own
loopback interface, nor one with keys to a router without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xllm.config.exposure import is_local_endpoint
from xllm.protocol.questions import RouterAddress
from xllm.protocol.transport.dealer import Reach
from xllm.protocol.transport.endpoint import WHICH_ADDRESS

MAX_ROUTERS = 64
"""Known at a time; further names are not learnt."""


class RouterList:
    """Routers in the order in which they are tried; one of them is the present one."""

    def __init__(self, endpoints: Sequence[str], server_key: str, *, discover: bool) -> None:
        self._given = [RouterAddress(one, server_key) for one in dict.fromkeys(endpoints)]
        self._named: list[RouterAddress] = []
        self._discover = discover
        self._at = self._given[0]
        self._reached: dict[str, Reach] = {}
        self._left: dict[str, str] = {}

    @property
    def present(self) -> RouterAddress:
        """The one spoken with, or tried."""
        return self._at

    def __len__(self) -> int:
        return len(self._given) + len(self._named)

    def __str__(self) -> str:
        return ", ".join(one.endpoint for one in (*self._given, *self._named))

    @property
    def left(self) -> tuple[str, ...]:
        """Why each router but the present one was last turned away from, if it was."""
        return tuple(why for one, why in self._left.items() if one != self._at.endpoint)

    def leave(self, reach: Reach, why: str) -> None:
        """The present one is turned away from; how far one came with it, and why."""
        self.tried(reach)
        is_told = reach in (Reach.PEER, Reach.REFUSED)
        self.pass_by(why if is_told else f"{why} ({self._found(self._at)})")

    def pass_by(self, why: str) -> None:
        """The present one will not be spoken with."""
        known = {one.endpoint for one in (*self._given, *self._named)}
        kept = {one: told for one, told in self._left.items() if one in known}
        self._left = {**kept, self._at.endpoint: why}  # another thread may be reading the old one
        self._reached = {one: reach for one, reach in self._reached.items() if one in known}

    def tried(self, reach: Reach) -> None:
        """How far one came with the present one."""
        self._reached[self._at.endpoint] = reach

    def unanswered(self) -> str:
        """What is told where none of them answers: what was found at each."""
        every = [*self._given, *self._named]
        told = [f"{one.endpoint} ({self._found(one)})" for one in every]
        silent = any(self._reached.get(one.endpoint) is Reach.SOMETHING for one in every)
        hint = f"; {WHICH_ADDRESS}" if silent else ""
        return f"no router answers at {', '.join(told)}{hint}"

    def learn(self, named: Iterable[RouterAddress]) -> None:
        """The present router named the others that it knows: they replace what was named before."""
        if not self._discover:
            return
        known = {one.endpoint for one in self._given}
        self._named = [one for one in named if self._fits(one) and one.endpoint not in known]
        del self._named[max(0, MAX_ROUTERS - len(self._given)) :]

    def turn(self) -> None:
        """To the next one; behind the last comes the first."""
        every = [*self._given, *self._named]
        places = [place for place, one in enumerate(every) if one.endpoint == self._at.endpoint]
        self._at = every[(places[0] + 1) % len(every)] if places else every[0]

    def _found(self, router: RouterAddress) -> str:
        match self._reached.get(router.endpoint, Reach.NOTHING):
            case Reach.NOTHING:
                return "nothing takes connections there"
            case Reach.SOMETHING:
                return "something listens there that does not speak ZeroMQ, or stands still"
            case Reach.OTHER_KEYS:
                return "it speaks without keys" if router.public_key else "it speaks with keys only"
            case Reach.REFUSED:
                return "it does not know our key"
            case Reach.PEER:
                return "it says nothing"

    def _fits(self, named: RouterAddress) -> bool:
        given = self._given[0]
        return bool(named.public_key) == bool(given.public_key) and (
            is_local_endpoint(given.endpoint) or not is_local_endpoint(named.endpoint)
        )
