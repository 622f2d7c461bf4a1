"""POST /v1/chat/completions and /v1/completions.

Reads and converts a body; `generation` submits it and writes what comes back.
"""

from __future__ import annotations

from functools import partial

import msgspec

from xllm.protocol.native import token_ids as native
from xllm.protocol.questions import DetokenizeIds, TokenizeText
from xllm.protocol.token_bytes import unpack_tokens
from xllm.router.http.chat_shape import ChatShape
from xllm.router.http.completion_body import CompletionDecoder
from xllm.router.http.completion_shape import CompletionShape, Echo
from xllm.router.http.context import Caller, FrontContext, caller_of
from xllm.router.http.convert import (
    Prompt,
    chat_request,
    check_completion,
    completion_requests,
)
from xllm.router.http.direct import Fail
from xllm.router.http.generation import Generation, Posted, Rest, last_event_id
from xllm.router.http.problem import field_named
from xllm.router.http.respond import Receive, Scope, Send, read_body
from xllm.router.http.schema import ChatBody, CompletionBody, decode_body
from xllm.router.http.sessions import session_of
from xllm.router.http.shape import AnswerShape, Envelope


class ChatEndpoint:
    """POST /v1/chat/completions."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = msgspec.json.Decoder(ChatBody)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._read(scope, await read_body(receive)).run(send)

    def begin(self, scope: Scope, body: bytes, fail: Fail) -> Rest | None:
        """See Generation.begin."""
        return self._read(scope, body).begin(fail)

    def _read(self, scope: Scope, data: bytes) -> Generation:
        caller = caller_of(scope)
        posted = Posted(data, last_event_id(scope))
        body = decode_body(self._decoder, data)
        session = session_of(body, caller.session, self._context.users_are_sessions)
        request = chat_request(body, self._context.settings, caller.trace, session)
        return Generation(self._context, caller, body, [request], ChatShape, posted)


class CompletionEndpoint:
    """POST /v1/completions."""

    methods = ("POST",)

    def __init__(self, context: FrontContext) -> None:
        self._context = context
        self._decoder = CompletionDecoder(native.load())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        posted = Posted(await read_body(receive), last_event_id(scope))
        await self._answer(caller_of(scope), posted, self._decoder.decode(posted.body), send)

    def begin(self, scope: Scope, body: bytes, fail: Fail) -> Rest | None:
        """See Generation.begin."""
        caller = caller_of(scope)
        posted = Posted(body, last_event_id(scope))
        asked = self._decoder.decode(body)
        if asked.echo:  # what is echoed may have to be waited for
            return partial(self._answer, caller, posted, asked)
        prompts = check_completion(asked, self._context.settings)
        return self._generation(caller, posted, asked, prompts).begin(fail)

    async def _answer(
        self, caller: Caller, posted: Posted, body: CompletionBody, send: Send
    ) -> None:
        prompts = check_completion(body, self._context.settings)
        echo: Echo | None = None
        if body.echo:
            prompts, echo = await self._echo(body, prompts, caller)
        await self._generation(caller, posted, body, prompts, echo).run(send)

    def _generation(
        self,
        caller: Caller,
        posted: Posted,
        body: CompletionBody,
        prompts: list[Prompt],
        echo: Echo | None = None,
    ) -> Generation:
        context = self._context
        session = session_of(body, caller.session, context.users_are_sessions)
        requests = completion_requests(body, prompts, context.settings, caller.trace, session)
        num_choices = requests[0].sampling.n

        def shape(envelope: Envelope) -> AnswerShape:
            return CompletionShape(envelope, num_choices, echo)

        return Generation(context, caller, body, requests, shape, posted)

    async def _echo(
        self, body: CompletionBody, prompts: list[Prompt], caller: Caller
    ) -> tuple[list[Prompt], Echo]:
        """The prompts as they are submitted, and what is echoed of them."""
        service = self._context.service
        texts: list[str] = []
        shown: list[Prompt] = []
        for index, prompt in enumerate(prompts):
            name = f"prompt[{index}]" if len(prompts) > 1 else "prompt"
            if isinstance(prompt, bytes):
                prompt = tuple(unpack_tokens(prompt))
            if isinstance(prompt, str):
                texts.append(prompt)
            else:
                ids_message = DetokenizeIds(id=0, model=body.model, token_ids=prompt)
                with field_named("token_ids", name):
                    texts.append((await service.texts.decode(ids_message, caller.tenant)).text)
            if isinstance(prompt, str) and body.logprobs is not None:
                text_message = TokenizeText(id=0, model=body.model, text=prompt)
                with field_named("text", name):
                    prompt = (await service.texts.encode(text_message, caller.tenant)).token_ids
            shown.append(prompt)
        ids = tuple(prompt if isinstance(prompt, tuple) else () for prompt in shown)
        return shown, Echo(tuple(texts), ids, scoring=body.max_tokens == 0)
