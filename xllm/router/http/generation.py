"""The life of one HTTP request that generates tokens: submitted, then written as it comes.

Knows messages and shapes, no bodies' fields but a few. Invariant: whatever ends this
(answer, failure, client gone, cancellation), no request of it stays open in the service.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import structlog

from xllm.errors import InvalidRequestError
from xllm.protocol.client import RouterMessage
from xllm.protocol.generation import RequestFailed, SubmitRequest
from xllm.protocol.transport.context import describe_error
from xllm.router.http.answer import StreamedAnswer, WholeAnswer
from xllm.router.http.batch import check_together
from xllm.router.http.context import Caller, FrontContext
from xllm.router.http.direct import DirectAnswer, Fail
from xllm.router.http.event_ids import (
    PARAM,
    EventSigner,
    LastEvent,
    Stream,
    body_digest,
    borders_of,
    proven,
)
from xllm.router.http.problem import failure_named, problem_of, problem_of_failure
from xllm.router.http.respond import Scope, Send, send_body
from xllm.router.http.schema import GenerationBody
from xllm.router.http.shape import AnswerShape, Envelope, total_usage
from xllm.router.http.stream_writer import StreamWriter
from xllm.router.recall import Outputs, Recall

LOG = structlog.get_logger(__name__)
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
RECALLED_HEADER = b"x-recalled-tokens"
"""Of an answer that goes on behind an event: how many tokens need not be drawn again for it."""
MAX_SEED = (1 << 64) - 1
MakeShape = Callable[[Envelope], AnswerShape]
Rest = Callable[[Send], Awaitable[None]]
"""What is left to do for a request whose body was read."""


class Posted(msgspec.Struct, frozen=True, gc=False):
    """What a client sent: the bytes of its body, and the last event that it has of the answer."""

    body: bytes
    last_event_id: bytes


class OpenStream(NamedTuple):
    """A stream whose requests are submitted, and what its first word is waited for with."""

    answer: StreamedAnswer
    writer: StreamWriter
    request_id: str


def last_event_id(scope: Scope) -> bytes:
    """The header's value; empty (as browsers have it) or absent: the answer is new."""
    values = [value for name, value in scope["headers"] if name == b"last-event-id"]
    if len(values) > 1:
        raise InvalidRequestError("Last-Event-ID stands more than once", param=PARAM)
    return values[0].strip() if values else b""


class Generation:
    """The life of one HTTP request that generates tokens."""

    __slots__ = (
        "_body",
        "_caller",
        "_context",
        "_ids",
        "_make_shape",
        "_num_recalled",
        "_posted",
        "_requests",
    )

    def __init__(
        self,
        context: FrontContext,
        caller: Caller,
        body: GenerationBody,
        requests: Sequence[SubmitRequest],
        make_shape: MakeShape,
        posted: Posted,
    ) -> None:
        self._context = context
        self._caller = caller
        self._body = body
        self._requests = requests
        self._make_shape = make_shape
        self._posted = posted
        self._ids: list[str] = []
        self._num_recalled = 0

    def begin(self, fail: Fail) -> Rest | None:
        """Submit what is answered as a whole by one terminal message, without a task: the answer,
        or `fail`, is called by that. What else there is to answer is returned; a stream is
        submitted before, so that its instance works while its task is made."""
        if self._body.stream:
            return partial(self._run, self._open())
        if self._posted.last_event_id or len(self._requests) > 1:
            return self.run
        service, caller = self._context.service, self._caller
        answer = DirectAnswer(caller.connection, self._shape, fail)
        request_id = service.submit(self._requests[0], caller.tenant, answer)
        if not answer.done:
            caller.connection.watch(partial(service.abort, request_id))
        return None

    async def run(self, send: Send) -> None:
        """Submit and answer."""
        await self._run(None, send)

    async def _run(self, opened: OpenStream | None, send: Send) -> None:
        try:
            if self._body.stream:
                await self._stream(opened or self._open(), send)
            elif self._posted.last_event_id:
                raise InvalidRequestError("Last-Event-ID goes with stream: true only", param=PARAM)
            else:
                await self._whole(send)
        finally:
            self._end()

    def _end(self) -> None:
        self._caller.connection.unwatch()
        self._abort()

    def _submit(
        self,
        sink: WholeAnswer | StreamedAnswer,
        requests: Sequence[SubmitRequest],
        last: LastEvent | None = None,
    ) -> None:
        service, tenant = self._context.service, self._caller.tenant
        borders = () if last is None else borders_of(last.places)
        recall = None if last is None else self._recall(last)
        if len(requests) > 1:
            check_together(service, tenant, len(requests))
        for request in requests:
            n = request.sampling.n
            own = borders[request.id * n : (request.id + 1) * n]
            self._ids.append(
                service.submit(request, tenant, sink, own, recall)
                if own
                else service.submit(request, tenant, sink)
            )
        self._caller.connection.watch(self._abort)

    def _recall(self, last: LastEvent) -> Recall | None:
        """Ask for the tokens that the client has, which an instance may still know: all that is
        lacking of what a router would have of them is their logprobs."""
        sampling = self._requests[0].sampling
        scored = sampling.logprobs is not None or sampling.prompt_logprobs is not None
        if scored or len(self._requests) > 1 or not any(borders_of(last.places)):
            return None
        return Recall(last.stream.request_id, partial(self._prove, last))

    def _prove(self, last: LastEvent, outputs: Outputs) -> Outputs:
        found = proven(last.places, outputs)
        self._num_recalled = sum(map(len, found))
        return found

    def _abort(self) -> None:
        """Stop what is still open; requests that have ended are unknown to the service."""
        for request_id in self._ids:
            self._context.service.abort(request_id)

    def _shape(self, request_id: str, created: int) -> AnswerShape:
        options = self._body.stream_options
        service, model = self._context.service, self._body.model
        return self._make_shape(
            Envelope(
                request_id=request_id,
                created=created,
                model=model,
                bytes_of=lambda token_id: service.token_bytes(model, token_id),
                include_usage=bool(options and options.include_usage),
            )
        )

    async def _whole(self, send: Send) -> None:
        answer = WholeAnswer(asyncio.get_running_loop(), len(self._requests))
        self._submit(answer, self._requests)
        results = await answer.wait_done()
        if answer.failure is not None:
            raise problem_of_failure(self._named(answer.failure))
        usage = total_usage([result.usage for result in results])
        request_id = self._ids[0]
        body = self._shape(request_id, int(time.time())).whole(results, usage)
        await send_body(send, body, headers=[(b"x-request-id", request_id.encode())])

    def _open(self) -> OpenStream:
        """Submit; all that can be done for the answer before its first word."""
        key, *before = self._context.service.event_keys
        signer = EventSigner(key, self._caller.tenant, *before)
        posted, num_choices = self._posted, self._requests[0].sampling.n
        last: LastEvent | None = None
        if posted.last_event_id:
            last = signer.read(posted.last_event_id, posted.body, num_choices * len(self._requests))
        seed = last.stream.seed if last is not None else int.from_bytes(os.urandom(8), "little")
        answer = StreamedAnswer(
            asyncio.get_running_loop(),
            len(self._requests),
            self._context.limits.max_pending_bytes,
            self._caller.connection.abort,
        )
        answer.merges = last is None
        requests = [_seeded(request, seed) for request in self._requests]
        try:
            self._submit(answer, requests, last)
            stream = Stream(self._ids[0], int(time.time()), seed, body_digest(posted.body))
            if last is not None:
                stream = last.stream
            return OpenStream(answer, self._writer(signer, stream, last), stream.request_id)
        except BaseException:
            self._end()
            raise

    async def _stream(self, opened: OpenStream, send: Send) -> None:
        messages = await opened.answer.take()
        # The status waits for the first word of the service: a request that it refuses is
        # answered as an error, not as a stream that begins well.
        if messages and isinstance(messages[0], RequestFailed):
            raise problem_of_failure(self._named(messages[0]))
        headers = [*STREAM_HEADERS, (b"x-request-id", opened.request_id.encode())]
        if self._posted.last_event_id:
            headers.append((RECALLED_HEADER, str(self._num_recalled).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._pass_on(opened.answer, messages, opened.writer, send)

    def _named(self, failure: RequestFailed) -> RequestFailed:
        """A failure of one of several prompts says of which."""
        several = len(self._requests) > 1
        return failure_named(failure, f"prompt[{failure.id}]") if several else failure

    def _writer(self, signer: EventSigner, stream: Stream, last: LastEvent | None) -> StreamWriter:
        options = self._body.stream_options
        return StreamWriter(
            self._shape(stream.request_id, stream.created),
            signer,
            stream,
            self._requests[0].sampling.n,
            len(self._requests),
            include_usage=bool(options and options.include_usage),
            last=last,
        )

    async def _pass_on(
        self,
        answer: StreamedAnswer,
        messages: Sequence[RouterMessage],
        writer: StreamWriter,
        send: Send,
    ) -> None:
        while True:
            last = answer.done  # all messages have been taken, and none will follow
            events = self._events(writer, messages, last)
            answer.merges = not writer.is_behind
            last = last or writer.ended
            if events or last:
                await send({"type": "http.response.body", "body": events, "more_body": not last})
            if last:
                return
            messages = await answer.take()

    def _events(self, writer: StreamWriter, messages: Sequence[RouterMessage], last: bool) -> bytes:
        try:
            events = writer.events(messages)
            return events + writer.end() if last and not writer.ended else events
        except Exception as error:
            # The stream has begun, so it must end with an event that says so.
            LOG.error("stream_failed", request_id=self._ids[0], error=describe_error(error))
            return writer.fail(problem_of(error))


def _seeded(request: SubmitRequest, seed: int) -> SubmitRequest:
    """The same request with a seed that its events' ids can name: each prompt has its own."""
    sampling = request.sampling
    if sampling.seed is not None:
        return request
    sampling = msgspec.structs.replace(sampling, seed=(seed + request.id) & MAX_SEED)
    return msgspec.structs.replace(request, sampling=sampling)
