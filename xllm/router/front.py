"""What a front end (HTTP, ZeroMQ) and the service know of each other.

A front end knows its connections and who is behind them (`Tenant`); the service knows requests.
Between them is a `Sink`: one callable end for all messages of one request, exactly one of which
is terminal, and the last.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from xllm.protocol.client import RouterMessage


@dataclasses.dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. `salt` is derived by the server from the tenant's key, never chosen by a client:
    cached prefixes are shared within it only."""

    name: str = "default"
    salt: bytes = b""
    account: str = ""
    """Under whose limits it falls; empty: its own name's."""


class Sink(Protocol):
    """Where the messages of one request go.

    `send` is called on the event loop's thread, must return at once and must not raise. It may
    be called before `submit` has returned. Each message carries the `id` of its SubmitRequest.
    """

    def send(self, message: RouterMessage) -> None:
        """TokenDelta, any number; then one RequestFinished or RequestFailed, and nothing more."""
        ...
