"""What every endpoint is given: the service, the settings and who asks.

Holds references only; decides nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec

from xllm.config.router import RouterSettings
from xllm.router.front import Tenant
from xllm.router.http.limits import HttpLimits
from xllm.router.http.respond import Scope
from xllm.router.service import RouterService


class Connection(Protocol):
    """The connection that a request came over."""

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call `on_lost` once when the client goes away, at once if it has."""
        ...

    def unwatch(self) -> None:
        """Stop watching."""
        ...

    def abort(self) -> None:
        """Drop the connection."""
        ...

    def respond(self, status: int, lines: bytes, body: bytes, *, close: bool = False) -> None:
        """Write the whole answer of a request that was begun without a task."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class FrontContext:
    """One HTTP front end's surroundings."""

    service: RouterService
    settings: RouterSettings
    limits: HttpLimits
    users_are_sessions: bool = False
    """Whether a `user` field names a session (routing.sessions)."""


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request, and over what."""

    tenant: Tenant
    connection: Connection
    trace: str
    session: str = ""
    """The x-session-id header."""


def caller_of(scope: Scope) -> Caller:
    """The caller that the application put into the scope."""
    return cast("Caller", cast("dict[str, Any]", scope)["caller"])
