"""The transport of one process: its ZeroMQ context, its keys, what fails in handlers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol, Self

import structlog
import zmq

from xllm.errors import BackpressureError, ClosedError, ConfigError, InvariantError
from xllm.protocol.authority import KnownPeer, PeerRole
from xllm.protocol.transport.allow_list import CLUSTER_DOMAIN, AllowList
from xllm.protocol.transport.security import Authenticator, Security

_log = structlog.get_logger("transport")
MAX_SOCKETS = 8192
"""Of one context. Connections that were accepted are none: limits bounds those."""
KEYS_PERIOD_S = 0.4
"""How often the allow-lists are looked at."""


class KeyedSocket(Protocol):
    """A socket that has connections with keys."""

    def keys_changed(self) -> None:
        """Cut the connections of those who are no longer admitted."""
        ...


def describe_error(error: BaseException) -> str:
    """Type, place and a short chain of places of an error: no values, no prompts."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return f"{type(error).__name__} at " + " > ".join(places[-4:])


class Transport:
    """Owns the process's context. Create it after the process was spawned, in its main thread;
    sockets are made from it inside the running loop and closed before it."""

    def __init__(
        self,
        security: Security | None = None,
        *,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._allowed: AllowList | None = None
        self._authenticator: Authenticator | None = None
        self._keyed: weakref.WeakSet[KeyedSocket] = weakref.WeakSet()
        self.num_bad = 0
        """Messages that did not decode."""
        self.num_refused = 0
        """Messages that their sender's roles may not say, or that were said in another's name."""
        self.num_cut = 0
        """Connections that were cut: their key was revoked, or they were too many."""
        if security is not None:
            try:
                self._allowed = AllowList(security.allowed_dir, security.clients_dir)
                self._authenticator = Authenticator(self._context, self._allowed)
            except (ConfigError, OSError):
                self._context.destroy(linger=0)
                raise
        self._closed = False
        self.security = security
        self.on_fatal = on_fatal
        self.num_handler_errors = 0

    @classmethod
    def with_keys(cls, keys_dir: str) -> Self:
        """One whose sockets use the keys of a directory; "": without any."""
        return cls(Security.load(keys_dir) if keys_dir else None)

    @property
    def public_key(self) -> str:
        """Of this process's node; "" without keys."""
        return self.security.public_key if self.security is not None else ""

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A raw socket of the context; only this package asks for one."""
        if self._closed:
            raise ClosedError("the transport is closed")
        if os.getpid() != self._pid:
            raise InvariantError("a transport does not survive a fork")
        try:
            return self._context.socket(kind)
        except zmq.ZMQError as error:
            raise BackpressureError(f"no further socket: {error.strerror}") from error

    def handler_failed(self, where: str, error: Exception) -> None:
        """One message's handler raised: that message is lost, the actor goes on, unless an
        invariant broke."""
        self.num_handler_errors += 1
        _log.error("handler_failed", where=where, error=describe_error(error))
        if isinstance(error, InvariantError) and self.on_fatal is not None:
            self.on_fatal(error)

    # -- keys --------------------------------------------------------------------------------

    def watch_keys(self, socket: KeyedSocket) -> None:
        """Tell a socket whenever the allow-lists changed."""
        self._keyed.add(socket)

    def peer(self, public_key: str, domain: str) -> KnownPeer | None:
        """Whose key that is at sockets of a domain; None: it is not admitted, or not any more."""
        return self._allowed.peer(public_key, domain) if self._allowed is not None else None

    def is_barred(self, public_key: str, role: PeerRole | None) -> bool:
        """Whether nothing may be said to the owner of a server's key. One that was found in the
        registry must be admitted in that role; one that a person gave (`role` None) must not have
        been revoked since the start."""
        if self._allowed is None:
            return False
        if role is None:
            return self._allowed.was_revoked(public_key)
        peer = self.peer(public_key, CLUSTER_DOMAIN)
        return peer is None or role not in peer.roles

    def refresh_keys(self) -> None:
        """Look at the allow-lists; where they changed, whoever is no longer admitted is cut.

        The actor calls it each KEYS_PERIOD_S."""
        if self._allowed is None or self._authenticator is None or self._closed:
            return
        if self._authenticator.revive():
            _log.error("authenticator_died")
        if self._allowed.refresh():
            _log.info("keys_changed")
            for socket in tuple(self._keyed):
                try:
                    socket.keys_changed()
                except Exception as error:  # the others must hear of it all the same
                    self.handler_failed("keys", error)

    # -- figures -----------------------------------------------------------------------------

    def counts(self) -> tuple[tuple[str, str, int], ...]:
        """(metric, what it says, value) of each counter of this process."""
        return (
            ("xllm_transport_bad_messages", "Messages that did not decode.", self.num_bad),
            (
                "xllm_transport_refused_messages",
                "Messages that their sender may not say, or said in another's name.",
                self.num_refused,
            ),
            (
                "xllm_transport_cut_connections",
                "Connections cut: their key was revoked, or they were too many.",
                self.num_cut,
            ),
            ("xllm_transport_handler_errors", "Messages lost to a bug.", self.num_handler_errors),
        )

    def metrics(self) -> bytes:
        """The counters as Prometheus text."""
        return "".join(
            f"# HELP {name}_total {text}\n# TYPE {name}_total counter\n{name}_total {value}\n"
            for name, text, value in self.counts()
        ).encode()

    def close(self) -> None:
        """Close the context. Sockets that are still open are closed with it."""
        if self._closed:
            return
        self._closed = True
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.destroy(linger=0)
