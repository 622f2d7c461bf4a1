"""The transport of one process: its ZeroMQ context, its keys, what fails in handlers."""

from __future__ import annotations

import os
from collections.abc import Callable

import structlog
import zmq

from xllm.errors import ClosedError, ConfigError, InvariantError
from xllm.protocol.transport.security import Authenticator, Security

_log = structlog.get_logger("transport")


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
        self._context.set(zmq.MAX_SOCKETS, 8192)
        self._authenticator: Authenticator | None = None
        if security is not None:
            try:
                self._authenticator = Authenticator(self._context, security)
            except ConfigError:
                self._context.destroy(linger=0)
                raise
        self._closed = False
        self.security = security
        self.on_fatal = on_fatal
        self.num_handler_errors = 0

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A raw socket of the context; only this package asks for one."""
        if self._closed:
            raise ClosedError("the transport is closed")
        if os.getpid() != self._pid:
            raise InvariantError("a transport does not survive a fork")
        return self._context.socket(kind)

    def handler_failed(self, where: str, error: Exception) -> None:
        """One message's handler raised: that message is lost, the actor goes on, unless an
        invariant broke."""
        self.num_handler_errors += 1
        _log.error("handler_failed", where=where, error=describe_error(error))
        if isinstance(error, InvariantError) and self.on_fatal is not None:
            self.on_fatal(error)

    def reload_allowed(self) -> None:
        """Read the allow-lists again."""
        if self._authenticator is not None:
            self._authenticator.reload()

    def close(self) -> None:
        """Close the context. Sockets that are still open are closed with it."""
        if self._closed:
            return
        self._closed = True
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.destroy(linger=0)
