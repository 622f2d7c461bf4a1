"""POST /v1/embeddings.

Each input is a request of its own; the answer has them in the order they were given. No more than
WINDOW of them, and than their tenant may have, are open at a time, so that a long list leaves room
for others. Invariant: whatever ends this (answer, failure, client gone, cancellation), no request
of it stays open.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import msgspec

from xllm.config.router import RouterSettings
from xllm.errors import InvalidRequestError
from xllm.protocol.client import RouterMessage
from xllm.protocol.generation import RequestFailed, RequestFinished, SubmitRequest, Usage
from xllm.router.http.batch import window_of
from xllm.router.http.context import Caller, FrontContext, caller_of
from xllm.router.http.convert import prompts_of
from xllm.router.http.problem import failure_named, problem_of_failure
from xllm.router.http.respond import Receive, Scope, Send, read_body, send_body
from xllm.router.http.schema import EmbeddingBody, decode_body
from xllm.router.http.shape import ENCODER, total_usage

WINDOW = 128
"""Inputs of one HTTP request that are open at a time."""


class EmbeddingsEndpoint:
    """POST /v1/embeddings."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(EmbeddingBody)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        caller = caller_of(scope)
        body = decode_body(self._decoder, await read_body(receive))
        requests = embedding_requests(body, self._context.settings, caller.trace)
        await VectorAnswer(self._context, caller, body, requests).run(send)


def embedding_requests(
    body: EmbeddingBody, settings: RouterSettings, trace: str
) -> list[SubmitRequest]:
    """One request for each input, numbered from 0."""
    if not body.model:
        raise InvalidRequestError("model must be given", param="model")
    if body.dimensions is not None and body.dimensions < 1:
        raise InvalidRequestError(
            f"dimensions must be at least 1, not {body.dimensions}", param="dimensions"
        )
    inputs = prompts_of(body.input, "input")
    if len(inputs) > settings.max_inputs:
        raise InvalidRequestError(
            f"{len(inputs)} inputs are more than {settings.max_inputs}", param="input"
        )
    for index, one in enumerate(inputs):
        if not one:
            raise InvalidRequestError(f"input[{index}] is empty", param=f"input[{index}]")
    return [
        SubmitRequest(
            id=index,
            model=body.model,
            prompt=one,
            stream=False,
            priority=body.priority or 0,
            offline=bool(body.offline),
            cache_salt=body.cache_salt or "",
            traceparent=trace,
            ttft_ms=body.ttft_ms or 0,
            embed=True,
            dimensions=body.dimensions or 0,
        )
        for index, one in enumerate(inputs)
    ]


class VectorSink:
    """The sink of an HTTP request's inputs: results as they come, and the first failure."""

    __slots__ = ("_loop", "_results", "_waiter", "failure")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._results: list[RequestFinished] = []
        self._waiter: asyncio.Future[None] | None = None
        self.failure: RequestFailed | None = None

    def send(self, message: RouterMessage) -> None:
        """Take a terminal message."""
        if isinstance(message, RequestFinished):
            self._results.append(message)
        elif isinstance(message, RequestFailed):
            self.failure = self.failure or message
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[RequestFinished]:
        """The results that came since the last call, at least one; or `failure` is set."""
        if not self._results and self.failure is None:
            self._waiter = self._loop.create_future()
            await self._waiter
            self._waiter = None
        results, self._results = self._results, []
        return results


class VectorAnswer:
    """The life of one HTTP request for vectors."""

    __slots__ = ("_body", "_caller", "_context", "_ids", "_requests")

    def __init__(
        self,
        context: FrontContext,
        caller: Caller,
        body: EmbeddingBody,
        requests: Sequence[SubmitRequest],
    ) -> None:
        self._context = context
        self._caller = caller
        self._body = body
        self._requests = requests
        self._ids: list[str] = []

    async def run(self, send: Send) -> None:
        """Submit and answer."""
        try:
            self._caller.connection.watch(self._abort)
            items, usage = await self._collect()
            fields = {
                "object": "list",
                "data": items,
                "model": self._body.model,
                "usage": {
                    "prompt_tokens": usage.prompt_tokens,
                    "total_tokens": usage.prompt_tokens,
                    "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                },
            }
            headers = [(b"x-request-id", self._ids[0].encode())]
            await send_body(send, ENCODER.encode(fields), headers=headers)
        finally:
            self._caller.connection.unwatch()
            self._abort()

    async def _collect(self) -> tuple[list[msgspec.Raw], Usage]:
        """The items of the answer, in order, each encoded as it comes."""
        sink = VectorSink(asyncio.get_running_loop())
        items = [msgspec.Raw(b"null")] * len(self._requests)
        usages: list[Usage] = []
        service, tenant = self._context.service, self._caller.tenant
        self._submit(sink, window_of(service, tenant, len(items), WINDOW))
        while len(usages) < len(items):
            results = await sink.take()
            if sink.failure is not None:
                raise problem_of_failure(self._named(sink.failure))
            for result in results:
                items[result.id] = self._item(result)
                usages.append(result.usage)
            self._submit(sink, len(results))
        return items, total_usage(usages)

    def _submit(self, sink: VectorSink, count: int) -> None:
        service, tenant = self._context.service, self._caller.tenant
        begin = len(self._ids)
        for request in self._requests[begin : begin + count]:
            self._ids.append(service.submit(request, tenant, sink))

    def _item(self, result: RequestFinished) -> msgspec.Raw:
        vector = result.embedding or b""
        shown: Any
        if self._body.encoding_format == "base64":
            shown = base64.b64encode(vector).decode("ascii")
        else:
            shown = memoryview(vector).cast("f").tolist()
        item = {"object": "embedding", "index": result.id, "embedding": shown}
        return msgspec.Raw(ENCODER.encode(item))

    def _named(self, failure: RequestFailed) -> RequestFailed:
        """A failure of one input, in the words of this path: `prompt` is unknown here."""
        name = f"input[{failure.id}]" if len(self._requests) > 1 else "input"
        return failure_named(failure, name)

    def _abort(self) -> None:
        """Stop what is still open; requests that have ended are unknown to the service."""
        for request_id in self._ids:
            self._context.service.abort(request_id)
