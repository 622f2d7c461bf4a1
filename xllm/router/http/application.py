"""The ASGI application: who may enter, where a path leads, and how every error looks.

Invariant: each request gets exactly one response; whatever is raised below becomes a JSON error
that tells no internals, and ends that request only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Protocol

import structlog
from starlette.routing import Route, Router

from xllm.errors import (
    AuthenticationError,
    MethodNotAllowedError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedMediaTypeError,
    XllmError,
)
from xllm.protocol.transport.context import describe_error
from xllm.router.http.auth import Gate, Header
from xllm.router.http.context import Caller, FrontContext
from xllm.router.http.convert import trace_of
from xllm.router.http.describe import (
    DetokenizeEndpoint,
    LiveEndpoint,
    MetricsEndpoint,
    ModelsEndpoint,
    ReadyEndpoint,
    TokenizeEndpoint,
    VersionEndpoint,
)
from xllm.router.http.direct import CLOSE, Fail, respond_problem
from xllm.router.http.embed import EmbeddingsEndpoint
from xllm.router.http.figures import HttpFigures
from xllm.router.http.generate import ChatEndpoint, CompletionEndpoint
from xllm.router.http.generation import Rest
from xllm.router.http.problem import Problem, problem_of
from xllm.router.http.respond import Application, ClientGone, Receive, Scope, Send, send_problem

LOG = structlog.get_logger(__name__)


class Endpoint(Protocol):
    """What a path leads to."""

    @property
    def methods(self) -> tuple[str, ...]:
        """HTTP methods that it answers."""
        ...

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer one request."""
        ...


class CheckedEndpoint:
    """An endpoint behind the checks of method and media type."""

    __slots__ = ("_endpoint", "_figures", "_has_body", "_methods", "_path")

    def __init__(self, path: str, endpoint: Endpoint, figures: HttpFigures) -> None:
        self._path = path
        self._figures = figures
        self._endpoint = endpoint
        self._methods = endpoint.methods
        self._has_body = "POST" in endpoint.methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then answer."""
        self.check(scope)
        await self._endpoint(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raise a Problem or an XllmError for what this endpoint does not take."""
        if scope["method"] not in self._methods:
            error = MethodNotAllowedError(f"only {' and '.join(self._methods)} is allowed here")
            allowed = ", ".join(self._methods).encode()
            raise Problem(error, headers=((b"allow", allowed),))
        self._figures.requested(self._path)
        if self._has_body:
            check_media(scope["headers"])


class BusyEndpoint(CheckedEndpoint):
    """One that can begin a request whose body is there without a task."""

    __slots__ = ("_begin",)

    def __init__(
        self, path: str, endpoint: ChatEndpoint | CompletionEndpoint, figures: HttpFigures
    ) -> None:
        super().__init__(path, endpoint, figures)
        self._begin = endpoint.begin

    def begin(self, scope: Scope, body: bytes, fail: Fail) -> Rest | None:
        """Check, then begin. Returns what answers the request, unless its last word does."""
        self.check(scope)
        return self._begin(scope, body, fail)


def check_media(headers: list[Header]) -> None:
    """A body must be plain JSON. (A web page of another origin cannot send that unasked.)"""
    kind = b""
    for name, value in headers:
        if name == b"content-type":
            kind = value
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise UnsupportedMediaTypeError("compressed bodies are not accepted")
    if kind != b"application/json" and not is_json(kind):
        raise UnsupportedMediaTypeError("content-type must be application/json")


def is_json(content_type: bytes) -> bool:
    """Whether a content type is JSON, whatever its parameters; its charset must be UTF-8."""
    kind, _, parameters = content_type.lower().partition(b";")
    charset = parameters.replace(b" ", b"").replace(b'"', b"")
    plain = b"charset=" not in charset or b"charset=utf-8" in charset
    return kind.strip() == b"application/json" and plain


class NoSuchPath:
    """Where every other path leads."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse."""
        raise NotFoundError("no such path")


def routes_of(context: FrontContext, figures: HttpFigures) -> list[Route]:
    """All paths of the front end; the busiest stand first."""
    ready = ReadyEndpoint(context)
    models = ModelsEndpoint(context)
    busy: list[tuple[str, ChatEndpoint | CompletionEndpoint]] = [
        ("/v1/chat/completions", ChatEndpoint(context)),
        ("/v1/completions", CompletionEndpoint(context)),
    ]
    table: list[tuple[str, Endpoint]] = [
        ("/v1/embeddings", EmbeddingsEndpoint(context)),
        ("/v1/models", models),
        ("/v1/models/{name:path}", models),
        ("/tokenize", TokenizeEndpoint(context)),
        ("/detokenize", DetokenizeEndpoint(context)),
        ("/health/live", LiveEndpoint()),
        ("/health/ready", ready),
        ("/health", ready),
        ("/metrics", MetricsEndpoint(context)),
        ("/version", VersionEndpoint()),
    ]
    checked: list[tuple[str, CheckedEndpoint]] = [
        *((path, BusyEndpoint(path, one, figures)) for path, one in busy),
        *((path, CheckedEndpoint(path, one, figures)) for path, one in table),
    ]
    return [Route(path, one, name=path) for path, one in checked]


NUM_BUSY = 3
"""So many of the first routes, which have no parameters, are found by their path alone."""


class HttpApplication:
    """The ASGI callable that uvicorn runs, and `begin` for requests that need no task."""

    def __init__(self, context: FrontContext, gate: Gate, figures: HttpFigures) -> None:
        self._gate = gate
        self._figures = figures
        routes = routes_of(context, figures)
        endpoints = {route.path: route.endpoint for route in routes}
        self._busiest = {path: endpoints[path] for path in (*endpoints,)[:NUM_BUSY]}
        self._busy: dict[str, BusyEndpoint] = {
            path: one for path, one in endpoints.items() if isinstance(one, BusyEndpoint)
        }
        self._router = Router(routes, redirect_slashes=False, default=NoSuchPath())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        try:
            self._enter(scope)
            endpoint = self._busiest.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
            else:
                await self._router(scope, receive, send)
        except ClientGone:
            return
        except Exception as error:
            await self._send_error(error, scope, send)

    def begin(self, scope: Scope, body: bytes) -> Application | None:
        """Begin a request that is here as a whole. Where it takes no more than its last word to
        answer it, its connection gets the answer then; else what answers it is returned."""
        endpoint = self._busy.get(scope["path"])
        if endpoint is None:
            return self
        fail = partial(self._fail, scope)
        try:
            self._enter(scope)
            rest = endpoint.begin(scope, body, fail)
        except Exception as error:
            fail(error)
            return None
        return None if rest is None else self._application(rest)

    def _application(self, rest: Rest) -> Application:
        async def go_on(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await rest(send)
            except Exception as error:
                await self._send_error(error, scope, send)

        return go_on

    def _enter(self, scope: Scope) -> None:
        """Let a request in, with its caller in the scope."""
        client, headers = scope["client"], scope["headers"]
        tenant = self._gate.admit(scope["path"], headers, client[0] if client else "")
        trace = session = ""
        for name, value in headers:
            if name == b"traceparent":
                trace = trace_of(value)
            elif name == b"x-session-id":
                session = value.decode("latin-1")
        scope["caller"] = Caller(tenant, scope["connection"], trace, session)

    def _problem(self, error: Exception) -> Problem:
        problem = problem_of(error)
        if isinstance(error, AuthenticationError | PermissionDeniedError):
            problem.headers += (CLOSE,)  # its body is not wanted
        self._figures.answered_with(problem.status)
        return problem

    async def _send_error(self, error: Exception, scope: Scope, send: Send) -> None:
        try:
            await send_problem(send, self._problem(error))
        finally:
            # Last: the client gets its answer even where the log cannot be written.
            log_fault(error, scope)

    def _fail(self, scope: Scope, error: Exception) -> None:
        respond_problem(scope["connection"], self._problem(error))
        # Later: where the log cannot be written, that is no concern of who told the error.
        asyncio.get_running_loop().call_soon(log_fault, error, scope)


def log_fault(error: Exception, scope: Scope) -> None:
    """Errors that are not ours to raise are faults."""
    if not isinstance(error, XllmError | Problem):
        LOG.error("request_failed", path=scope["path"][:200], error=describe_error(error))
