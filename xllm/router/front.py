"""What a front end (HTTP, ZeroMQ) and the service know of each other.

A front end knows its connections and who is behind them (`Tenant`); the service knows requests.
Between them is a `Sink`: one callable end for all messages of one request, exactly one of which
is terminal, and the last.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Protocol

from xllm.protocol.authority import KnownPeer
from xllm.protocol.client import RouterMessage

_SALT_LABEL = b"xllm peer salt v1"


@dataclasses.dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. `salt` is derived by the server from the tenant's key, never chosen by a client:
    cached prefixes are shared within it only."""

    name: str = "default"
    salt: bytes = b""
    account: str = ""
    """Under whose limits it falls; empty: its own name's."""


def tenant_of(identity: bytes, peer: KnownPeer | None) -> Tenant:
    """The tenant of a ZeroMQ connection: by its key, or, without keys, one for itself to the text
    pool that shares prefixes with all others of that kind. Under limits those are one, or a client
    could have more by connecting more often."""
    if peer is None:
        return Tenant(f"zmq-{identity.hex()[:32]}", account=Tenant().name)
    return Tenant(peer.name, hashlib.sha256(_SALT_LABEL + peer.public_key.encode()).digest())


class Sink(Protocol):
    """Where the messages of one request go.

    `send` is called on the event loop's thread, must return at once and must not raise. It may
    be called before `submit` has returned. Each message carries the `id` of its SubmitRequest.
    """

    def send(self, message: RouterMessage) -> None:
        """TokenDelta, any number; then one RequestFinished or RequestFailed, and nothing more."""
        ...
