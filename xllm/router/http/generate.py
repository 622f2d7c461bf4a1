"""POST /v1/chat/completions and /v1/completions.

Reads and converts a body, submits, and writes what comes back. Invariant: whatever ends this
(answer, failure, client gone, cancellation), no request of it stays open in the service.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from xllm.errors import InvalidRequestError
from xllm.protocol.client import (
    DetokenizeIds,
    RequestFailed,
    RouterMessage,
    SubmitRequest,
    TokenizeText,
)
from xllm.protocol.transport.context import describe_error
from xllm.router.http.answer import StreamedAnswer, WholeAnswer
from xllm.router.http.chat_shape import ChatShape
from xllm.router.http.completion_shape import CompletionShape, Echo
from xllm.router.http.context import Caller, FrontContext, caller_of
from xllm.router.http.convert import (
    Prompt,
    chat_request,
    check_completion,
    completion_requests,
)
from xllm.router.http.event_ids import (
    PARAM,
    EventSigner,
    LastEvent,
    Stream,
    body_digest,
    borders_of,
)
from xllm.router.http.problem import (
    field_named,
    problem_of,
    problem_of_failure,
)
from xllm.router.http.respond import Receive, Scope, Send, read_body, send_body
from xllm.router.http.schema import ChatBody, CompletionBody, GenerationBody, decode_body
from xllm.router.http.sessions import session_of
from xllm.router.http.shape import AnswerShape, Envelope, total_usage
from xllm.router.http.stream_writer import StreamWriter

LOG = structlog.get_logger(__name__)
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
MAX_SEED = (1 << 64) - 1
MakeShape = Callable[[Envelope], AnswerShape]


class ChatEndpoint:
    """POST /v1/chat/completions."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(ChatBody)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        caller = caller_of(scope)
        posted = Posted(await read_body(receive), last_event_id(scope))
        body = decode_body(self._decoder, posted.body)
        session = session_of(body, caller.session, self._context.users_are_sessions)
        request = chat_request(body, self._context.settings, caller.trace, session)
        await Generation(self._context, caller, body, [request], ChatShape, posted).run(send)


class CompletionEndpoint:
    """POST /v1/completions."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(CompletionBody)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        caller = caller_of(scope)
        posted = Posted(await read_body(receive), last_event_id(scope))
        body = decode_body(self._decoder, posted.body)
        settings = self._context.settings
        prompts = check_completion(body, settings)
        echo: Echo | None = None
        if body.echo:
            prompts, echo = await self._echo(body, prompts, caller)
        session = session_of(body, caller.session, self._context.users_are_sessions)
        requests = completion_requests(body, prompts, settings, caller.trace, session)
        num_choices = requests[0].sampling.n

        def shape(envelope: Envelope) -> AnswerShape:
            return CompletionShape(envelope, num_choices, echo)

        await Generation(self._context, caller, body, requests, shape, posted).run(send)

    async def _echo(
        self, body: CompletionBody, prompts: list[Prompt], caller: Caller
    ) -> tuple[list[Prompt], Echo]:
        """The prompts as they are submitted, and what is echoed of them."""
        service = self._context.service
        texts: list[str] = []
        shown: list[Prompt] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                texts.append(prompt)
            else:
                ids_message = DetokenizeIds(id=0, model=body.model, token_ids=prompt)
                with field_named("token_ids", "prompt"):
                    texts.append((await service.detokenize(ids_message, caller.tenant)).text)
            if isinstance(prompt, str) and body.logprobs is not None:
                text_message = TokenizeText(id=0, model=body.model, text=prompt)
                with field_named("text", "prompt"):
                    prompt = (await service.tokenize(text_message, caller.tenant)).token_ids
            shown.append(prompt)
        ids = tuple(() if isinstance(prompt, str) else prompt for prompt in shown)
        return shown, Echo(tuple(texts), ids, scoring=body.max_tokens == 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Posted:
    """What a client sent: the bytes of its body, and the last event that it has of the answer."""

    body: bytes
    last_event_id: bytes


def last_event_id(scope: Scope) -> bytes:
    """The header's value; empty (as browsers have it) or absent: the answer is new."""
    values = [value for name, value in scope["headers"] if name == b"last-event-id"]
    if len(values) > 1:
        raise InvalidRequestError("Last-Event-ID stands more than once", param=PARAM)
    return values[0].strip() if values else b""


class Generation:
    """The life of one HTTP request that generates tokens."""

    __slots__ = ("_body", "_caller", "_context", "_ids", "_make_shape", "_posted", "_requests")

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

    async def run(self, send: Send) -> None:
        """Submit and answer."""
        try:
            if self._body.stream:
                await self._stream(send)
            elif self._posted.last_event_id:
                raise InvalidRequestError("Last-Event-ID goes with stream: true only", param=PARAM)
            else:
                await self._whole(send)
        finally:
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
        for request in requests:
            n = request.sampling.n
            own = borders[request.id * n : (request.id + 1) * n]
            self._ids.append(
                service.submit(request, tenant, sink, own)
                if own
                else service.submit(request, tenant, sink)
            )
        self._caller.connection.watch(self._abort)

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
            raise problem_of_failure(answer.failure)
        usage = total_usage([result.usage for result in results])
        request_id = self._ids[0]
        body = self._shape(request_id, int(time.time())).whole(results, usage)
        await send_body(send, body, headers=[(b"x-request-id", request_id.encode())])

    async def _stream(self, send: Send) -> None:
        signer = EventSigner(self._context.service.event_key, self._caller.tenant)
        posted, sampling = self._posted, self._requests[0].sampling
        last: LastEvent | None = None
        if posted.last_event_id:
            num_choices = sampling.n * len(self._requests)
            last = signer.read(posted.last_event_id, posted.body, num_choices)
        seed = last.stream.seed if last is not None else int.from_bytes(os.urandom(8), "little")
        answer = StreamedAnswer(
            asyncio.get_running_loop(),
            len(self._requests),
            self._context.limits.max_pending_bytes,
            self._caller.connection.abort,
        )
        answer.merges = last is None
        self._submit(answer, [_seeded(request, seed) for request in self._requests], last)
        messages = await answer.take()
        # The status waits for the first word of the service: a request that it refuses is
        # answered as an error, not as a stream that begins well.
        if messages and isinstance(messages[0], RequestFailed):
            raise problem_of_failure(messages[0])
        stream = Stream(self._ids[0], int(time.time()), seed, body_digest(posted.body))
        writer = self._writer(signer, stream if last is None else last.stream, last)
        request_id = stream.request_id if last is None else last.stream.request_id
        headers = [*STREAM_HEADERS, (b"x-request-id", request_id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._pass_on(answer, messages, writer, send)

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
