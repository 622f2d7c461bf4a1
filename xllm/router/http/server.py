"""The HTTP server inside the router's process: starts, sweeps its connections, stops.

Knows uvicorn and sockets, no endpoints. Invariant: the address is bound before `start` returns,
and nothing here touches the process's signal handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Generator
from typing import Any, cast

import uvicorn

from xllm.config.exposure import check_exposure
from xllm.config.settings import Settings
from xllm.errors import ConfigError, ListenError
from xllm.router.http.application import HttpApplication
from xllm.router.http.auth import Gate, KeyFile
from xllm.router.http.context import FrontContext
from xllm.router.http.figures import HttpFigures
from xllm.router.http.limits import HttpLimits, limits_of
from xllm.router.http.protocol import GuardedProtocol, drain
from xllm.router.service import RouterService

BACKLOG = 2048
KEYS_PERIOD_S = 0.4
"""How often the key file is looked at."""
FLUSH_S = 2
"""What answers get to leave at a stop: their requests have ended, only bytes are on the way."""


class QuietServer(uvicorn.Server):
    """uvicorn's server, as a part of a process that has its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the process."""
        yield


class HttpFront:
    """The HTTP front end of one router."""

    def __init__(
        self, service: RouterService, settings: Settings, *, limits: HttpLimits | None = None
    ) -> None:
        check_exposure(settings)
        path = settings.router.api_key_file
        self._key_file = KeyFile(path) if path else None
        self._gate = Gate(self._key_file.tenants if self._key_file is not None else {})
        self._settings = settings
        self._limits = limits or limits_of(settings.router)
        context = FrontContext(
            service,
            settings.router,
            self._limits,
            settings.routing.sessions == "user",
        )
        self._figures = HttpFigures(service.registry, lambda: self.num_connections)
        self._application = HttpApplication(context, self._gate, self._figures)
        self._server: QuietServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._key_look: asyncio.TimerHandle | None = None

    async def start(self) -> str:
        """Listen, and return the address as `http://host:port`."""
        router = self._settings.router
        sock = bind(router.host, router.port, shared=router.share_port)
        host, port = sock.getsockname()[:2]
        server = QuietServer(self._config())
        self._server = server
        self._serving = asyncio.create_task(server.serve(sockets=[sock]), name="http")
        while not server.started:
            if self._serving.done():
                await self._serving
                raise ConfigError(f"the HTTP server did not start on {host}:{port}")
            await asyncio.sleep(0.001)
        self._arm_sweep()
        self._look_at_keys()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def drain(self) -> None:
        """Where other processes listen at the address, too: take no new connection, which they
        get then, and end each that is open with its answer."""
        if self._server is None or not self._settings.router.share_port:
            return
        for listener in self._server.servers:
            listener.close()
        for connection in list(self._server.server_state.connections):
            drain(cast("GuardedProtocol", connection))

    async def stop(self) -> None:
        """Accept nothing more, let open responses end (the service has ended their requests),
        close."""
        for timer in (self._sweep, self._key_look):
            if timer is not None:
                timer.cancel()
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        await self._serving

    @property
    def num_connections(self) -> int:
        """Open connections."""
        return len(self._server.server_state.connections) if self._server else 0

    def _config(self) -> uvicorn.Config:
        protocol: Any = functools.partial(
            GuardedProtocol,
            limits=self._limits,
            on_refused=self._figures.answered_with,
            begin=self._application.begin,
        )
        return uvicorn.Config(
            cast("Any", self._application),
            http=protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="critical",
            backlog=BACKLOG,
            timeout_graceful_shutdown=FLUSH_S,
        )

    def _look_at_keys(self) -> None:
        if self._key_file is None:
            return
        if self._key_file.refresh():
            self._gate.replace(self._key_file.tenants)
        loop = asyncio.get_running_loop()
        self._key_look = loop.call_later(KEYS_PERIOD_S, self._look_at_keys)

    def _arm_sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = loop.call_later(self._limits.sweep_s, self._check_connections)

    def _check_connections(self) -> None:
        assert self._server is not None
        now = asyncio.get_running_loop().time()
        for connection in list(self._server.server_state.connections):
            cast("GuardedProtocol", connection).check_time(now)
        self._arm_sweep()


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that listens on one address; ListenError where it cannot. `shared`: other sockets
    of this user may listen there too, and each new connection goes to one of them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, number, _, address = found[0]
        sock = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"{host}: {error.strerror}", param="router.host") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        message = f"cannot listen on {host}:{port}: {error.strerror}"
        raise ListenError(message, param="router.port") from error
    sock.setblocking(False)
    return sock
