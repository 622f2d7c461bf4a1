"""From the bodies of HTTP requests to the messages of the service.

Decides defaults and refuses combinations that make no sense; the service checks the bounds of
every value. Knows no sockets and no tokenizer.
"""

from __future__ import annotations

import re
from typing import cast

import msgspec

from xllm.config.router import RouterSettings
from xllm.errors import InvalidRequestError
from xllm.protocol.generation import ChatMessage, ContentPart, SubmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.router.http.schema import (
    ABSENT,
    ChatBody,
    CompletionBody,
    GenerationBody,
    MessageBody,
    PackedBody,
)

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for plain completions; a chat may use what the context leaves."""

TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
PlainPrompt = str | tuple[int, ...]
"""A text, or token ids."""
Prompt = PlainPrompt | bytes
"""The same, or ids as bytes (see token_bytes)."""
_Many = list[str | list[int]]


def trace_of(value: bytes) -> str:
    """A W3C traceparent header, or "" for anything else."""
    return value.decode("ascii") if TRACEPARENT.fullmatch(value) else ""


def chat_request(
    body: ChatBody, settings: RouterSettings, trace: str, session: str = ""
) -> SubmitRequest:
    """The request of a chat completion; its id is 0."""
    check_generation(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= settings.max_logprobs:
        raise InvalidRequestError(
            f"top_logprobs must be from 0 to {settings.max_logprobs}, not {body.top_logprobs}",
            param="top_logprobs",
        )
    limit, limit_too = body.max_completion_tokens, body.max_tokens
    if limit is not None and limit_too is not None and limit != limit_too:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ", param="max_completion_tokens"
        )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_of(body, limit_too if limit is None else limit, logprobs)
    return msgspec.structs.replace(
        _request(body, sampling, settings, trace, session),
        messages=chat_messages(body.messages),
        chat_template_kwargs=body.chat_template_kwargs or {},
    )


def completion_requests(
    body: CompletionBody,
    prompts: list[Prompt],
    settings: RouterSettings,
    trace: str,
    session: str = "",
) -> list[SubmitRequest]:
    """One request for each prompt, numbered from 0."""
    scoring = bool(body.echo) and body.max_tokens == 0
    limit = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    # A prompt that is only scored still runs one step; its token is dropped from the answer.
    sampling = sampling_of(body, 1 if scoring else limit, body.logprobs)
    if body.echo and body.logprobs is not None:
        sampling = with_prompt_logprobs(sampling, body.logprobs)
    request = _request(body, sampling, settings, trace, session)
    return [
        msgspec.structs.replace(request, id=index, packed_prompt=prompt)
        if isinstance(prompt, bytes)
        else msgspec.structs.replace(request, id=index, prompt=prompt)
        for index, prompt in enumerate(prompts)
    ]


def _request(
    body: GenerationBody,
    sampling: SamplingParams,
    settings: RouterSettings,
    trace: str,
    session: str,
) -> SubmitRequest:
    """What chats and completions ask alike: all but their content."""
    return SubmitRequest(
        id=0,
        model=body.model,
        sampling=sampling,
        stream=bool(body.stream),
        hold_ms=settings.hold_ms,
        priority=body.priority or 0,
        offline=bool(body.offline),
        cache_salt=body.cache_salt or "",
        traceparent=trace,
        ttft_ms=body.ttft_ms or 0,
        tpot_ms=body.tpot_ms or 0,
        session=session,
    )


def check_completion(body: CompletionBody, settings: RouterSettings) -> list[Prompt]:
    """The prompts of a completion whose fields go together."""
    check_generation(body)
    if body.suffix:
        raise InvalidRequestError("suffix is not supported", param="suffix")
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise InvalidRequestError("best_of must equal n", param="best_of")
    if body.echo and body.stream and body.logprobs is not None:
        raise InvalidRequestError("echo with logprobs cannot be streamed", param="echo")
    prompts: list[Prompt] = (
        [body.prompt] if isinstance(body, PackedBody) else [*prompts_of(body.prompt)]
    )
    if len(prompts) > settings.max_prompts:
        raise InvalidRequestError(
            f"{len(prompts)} prompts are more than {settings.max_prompts}", param="prompt"
        )
    if len(prompts) * max(1, body.n or 1) > settings.max_choices:
        raise InvalidRequestError(f"n times prompts is more than {settings.max_choices}", param="n")
    return prompts


def check_generation(body: GenerationBody) -> None:
    """Refuse features that are not here and fields that contradict each other."""
    body.check_refused()
    if not body.model:
        raise InvalidRequestError("model must be given", param="model")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream", param="stream_options")
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidRequestError("response_format must be text", param="response_format")


def prompts_of(
    prompt: PlainPrompt | list[str | int | list[int]], name: str = "prompt"
) -> list[PlainPrompt]:
    """A prompt field, called `name`, as one prompt or several, each a text or token ids."""
    if isinstance(prompt, str | tuple):
        return [prompt]
    if not prompt:
        raise InvalidRequestError(f"{name} is empty", param=name)
    kinds = set(map(type, prompt))  # not a loop of ours: there may be fifty thousand ids
    if len(kinds) > 1:
        raise InvalidRequestError(f"{name} mixes texts and token ids", param=name)
    if kinds == {int}:
        return [cast("tuple[int, ...]", tuple(prompt))]
    return [one if isinstance(one, str) else tuple(one) for one in cast("_Many", prompt)]


def chat_messages(bodies: list[MessageBody]) -> tuple[ChatMessage, ...]:
    """The turns of a chat; only text is accepted."""
    if not bodies:
        raise InvalidRequestError("messages is empty", param="messages")
    return tuple(chat_message(body, index) for index, body in enumerate(bodies))


def chat_message(body: MessageBody, index: int) -> ChatMessage:
    """One turn; `developer` is OpenAI's newer word for `system`."""
    for name, raw in (("tool_calls", body.tool_calls), ("function_call", body.function_call)):
        if raw is not ABSENT and bytes(raw).strip() not in (b"null", b"[]"):
            raise InvalidRequestError(f"{name} is not supported", param=f"messages[{index}].{name}")
    content = body.content
    if content is None:
        raise InvalidRequestError("content must be given", param=f"messages[{index}].content")
    role = "system" if body.role == "developer" else body.role
    if isinstance(content, str):
        return ChatMessage(role=role, content=content, name=body.name or "")
    parts = []
    for position, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise InvalidRequestError(
                "only text content is supported", param=f"messages[{index}].content[{position}]"
            )
        parts.append(ContentPart(type="text", text=part.text))
    return ChatMessage(role=role, content=tuple(parts), name=body.name or "")


def sampling_of(
    body: GenerationBody, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Sampling parameters, with the protocol's defaults for what is not given."""
    stop = body.stop
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=0 if body.min_tokens is None else body.min_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=0.0 if body.min_p is None else body.min_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        n=1 if body.n is None else body.n,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
    )


def with_prompt_logprobs(sampling: SamplingParams, count: int) -> SamplingParams:
    """The same parameters, with the prompt's own logprobs asked for."""
    fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    fields["prompt_logprobs"] = count
    return SamplingParams(**fields)
