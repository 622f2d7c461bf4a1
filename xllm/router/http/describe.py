"""The endpoints that answer questions: models, tokens, health, metrics, version.

Knows the service's answers and how they look in JSON; changes nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from xllm import __version__
from xllm.errors import InvalidRequestError, ModelNotFoundError
from xllm.protocol.questions import DetokenizeIds, HealthReport, ModelInfo, TokenizeText
from xllm.router.http.context import FrontContext, caller_of
from xllm.router.http.convert import chat_messages
from xllm.router.http.problem import field_named
from xllm.router.http.respond import Receive, Scope, Send, read_body, send_body
from xllm.router.http.schema import DetokenizeBody, TokenizeBody, decode_body

GET = ("GET", "HEAD")
CREATED = 0
"""When a model was made is nowhere said. All routers must say the same of it."""
METRICS_TYPE = (b"content-type", CONTENT_TYPE_LATEST.encode())


async def send_json(send: Send, value: Any, status: int = 200) -> None:
    """One JSON value as a whole response."""
    await send_body(send, msgspec.json.encode(value), status=status)


class ModelsEndpoint:
    """GET /v1/models and /v1/models/NAME."""

    methods = GET

    def __init__(self, context: FrontContext) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        models = self._context.service.models()
        name = scope["path_params"].get("name")
        if name is None:
            await send_json(send, {"object": "list", "data": [self._shown(one) for one in models]})
            return
        for model in models:
            if model.name == name:
                await send_json(send, self._shown(model))
                return
        raise ModelNotFoundError(f"no model {name[:100]!r} is served here", param="model")

    def _shown(self, model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": CREATED,
            "owned_by": "xllm",
            "max_model_len": model.max_model_len,
            "ready": model.ready,
            "task": model.task,
        }


class TokenizeEndpoint:
    """POST /tokenize."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(TokenizeBody)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = decode_body(self._decoder, await read_body(receive))
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("either prompt or messages must be given", param="prompt")
        message = TokenizeText(
            id=0,
            model=body.model,
            text=body.prompt,
            messages=None if body.messages is None else chat_messages(body.messages),
            add_special_tokens=body.add_special_tokens,
        )
        with field_named("text", "prompt"):
            answer = await self._context.service.tokenize(message, caller_of(scope).tenant)
        await send_json(
            send,
            {
                "count": len(answer.token_ids),
                "max_model_len": answer.max_model_len,
                "tokens": answer.token_ids,
            },
        )


class DetokenizeEndpoint:
    """POST /detokenize."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(DetokenizeBody)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = decode_body(self._decoder, await read_body(receive))
        message = DetokenizeIds(id=0, model=body.model, token_ids=tuple(body.tokens))
        with field_named("token_ids", "tokens"):
            answer = await self._context.service.detokenize(message, caller_of(scope).tenant)
        await send_json(send, {"prompt": answer.text})


class LiveEndpoint:
    """GET /health/live: this process answers, and no more. The one public path."""

    methods = GET

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await send_json(send, {"status": "live"})


class ReadyEndpoint:
    """GET /health/ready (and /health): one token came through the whole data path.

    Callers that ask at the same time share one probe, so that asking often costs little."""

    methods = GET

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._probe: asyncio.Task[HealthReport] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._context.service.health(probe=True))
        report = await asyncio.shield(self._probe)
        ready = report.live and report.ready
        shown = {
            "status": "ready" if ready else "not_ready",
            "degraded": report.degraded,
            "version": report.version or __version__,
        }
        await send_json(send, shown, 200 if ready else 503)


class MetricsEndpoint:
    """GET /metrics: the metrics of all processes, as Prometheus text."""

    methods = GET

    def __init__(self, context: FrontContext) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await send_body(send, self._context.service.metrics_text(), content_type=METRICS_TYPE)


class VersionEndpoint:
    """GET /version."""

    methods = GET

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await send_json(send, {"version": __version__})
