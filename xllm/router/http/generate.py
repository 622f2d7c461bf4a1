"""POST /v1/chat/completions and /v1/completions.

Reads and converts a body, submits, and writes what comes back. Invariant: whatever ends this
(answer, failure, client gone, cancellation), no request of it stays open in the service.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from xllm.protocol.client import (
    DetokenizeIds,
    RequestFailed,
    RequestFinished,
    RouterMessage,
    SubmitRequest,
    TokenDelta,
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
from xllm.router.http.problem import (
    Problem,
    field_named,
    problem_json,
    problem_of,
    problem_of_failure,
)
from xllm.router.http.respond import Receive, Scope, Send, read_body, send_body
from xllm.router.http.schema import ChatBody, CompletionBody, GenerationBody, decode_body
from xllm.router.http.sessions import session_of
from xllm.router.http.shape import DONE, AnswerShape, Envelope, total_usage

LOG = structlog.get_logger(__name__)
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
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
        body = decode_body(self._decoder, await read_body(receive))
        session = session_of(body, caller.session, self._context.users_are_sessions)
        request = chat_request(body, self._context.settings, caller.trace, session)
        await Generation(self._context, caller, body, [request], ChatShape).run(send)


class CompletionEndpoint:
    """POST /v1/completions."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(CompletionBody)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        caller = caller_of(scope)
        body = decode_body(self._decoder, await read_body(receive))
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

        await Generation(self._context, caller, body, requests, shape).run(send)

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


class Generation:
    """The life of one HTTP request that generates tokens."""

    __slots__ = ("_body", "_caller", "_context", "_ids", "_make_shape", "_requests")

    def __init__(
        self,
        context: FrontContext,
        caller: Caller,
        body: GenerationBody,
        requests: Sequence[SubmitRequest],
        make_shape: MakeShape,
    ) -> None:
        self._context = context
        self._caller = caller
        self._body = body
        self._requests = requests
        self._make_shape = make_shape
        self._ids: list[str] = []

    async def run(self, send: Send) -> None:
        """Submit and answer."""
        try:
            if self._body.stream:
                await self._stream(send)
            else:
                await self._whole(send)
        finally:
            self._caller.connection.unwatch()
            self._abort()

    def _submit(self, sink: WholeAnswer | StreamedAnswer) -> None:
        service, tenant = self._context.service, self._caller.tenant
        for request in self._requests:
            self._ids.append(service.submit(request, tenant, sink))
        self._caller.connection.watch(self._abort)

    def _abort(self) -> None:
        """Stop what is still open; requests that have ended are unknown to the service."""
        for request_id in self._ids:
            self._context.service.abort(request_id)

    def _shape(self) -> AnswerShape:
        options = self._body.stream_options
        service, model = self._context.service, self._body.model
        return self._make_shape(
            Envelope(
                request_id=self._ids[0],
                created=int(time.time()),
                model=model,
                bytes_of=lambda token_id: service.token_bytes(model, token_id),
                include_usage=bool(options and options.include_usage),
            )
        )

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._ids[0].encode())]

    async def _whole(self, send: Send) -> None:
        answer = WholeAnswer(asyncio.get_running_loop(), len(self._requests))
        self._submit(answer)
        results = await answer.wait_done()
        if answer.failure is not None:
            raise problem_of_failure(answer.failure)
        usage = total_usage([result.usage for result in results])
        body = self._shape().whole(results, usage)
        await send_body(send, body, headers=self._headers())

    async def _stream(self, send: Send) -> None:
        answer = StreamedAnswer(
            asyncio.get_running_loop(),
            len(self._requests),
            self._context.limits.max_pending_bytes,
            self._caller.connection.abort,
        )
        self._submit(answer)
        messages = await answer.take()
        # The status waits for the first word of the service: a request that it refuses is
        # answered as an error, not as a stream that begins well.
        if messages and isinstance(messages[0], RequestFailed):
            raise problem_of_failure(messages[0])
        headers = STREAM_HEADERS + self._headers()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        writer = StreamWriter(self._shape(), self._requests[0].sampling.n, self._body)
        while True:
            last = answer.done  # all messages have been taken, and none will follow
            events = self._events(writer, messages, last)
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


class StreamWriter:
    """Turns the messages of a stream into events; knows when it has ended."""

    __slots__ = ("_include_usage", "_num_choices", "_results", "_shape", "_total", "ended")

    def __init__(self, shape: AnswerShape, num_choices: int, body: GenerationBody) -> None:
        self._shape = shape
        self._num_choices = num_choices
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._results: list[RequestFinished] = []
        self.ended = False

    def events(self, messages: Sequence[RouterMessage]) -> bytes:
        """The events of these messages as one piece."""
        shape, num_choices = self._shape, self._num_choices
        parts: list[bytes] = []
        for message in messages:
            if type(message) is TokenDelta:
                parts.append(shape.delta(message.id * num_choices + message.choice, message))
            elif type(message) is RequestFinished:
                self._results.append(message)
                first = message.id * num_choices
                parts += [shape.finish(first + one.index, one) for one in message.choices]
            elif type(message) is RequestFailed:
                parts.append(self.fail(problem_of_failure(message)))
                break
        return b"".join(parts)

    def end(self) -> bytes:
        """The events behind the last choice."""
        self.ended = True
        usage = b""
        if self._include_usage:
            usage = self._shape.usage(total_usage([one.usage for one in self._results]))
        return usage + DONE

    def fail(self, problem: Problem) -> bytes:
        """The event that ends a stream which cannot go on."""
        self.ended = True
        return b"data: " + problem_json(problem) + b"\n\n"
