"""What a user asks for, as a message: types are checked here, bounds by the router."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar

import msgspec

from xllm.errors import InvalidRequestError
from xllm.protocol.client import ClientMessage
from xllm.protocol.codec import encode
from xllm.protocol.generation import ChatMessage, SubmitRequest
from xllm.protocol.questions import DetokenizeIds, TokenizeText
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import PACK_FROM, pack_tokens
from xllm.protocol.wrong_value import explain, shown

T = TypeVar("T")

Prompt = str | Sequence[int]
"""Text, or token ids."""

Messages = Sequence[Mapping[str, Any] | ChatMessage]
"""A conversation: mappings with `role` and `content`, as in the OpenAI API."""

_REQUEST_FIELDS = frozenset(SubmitRequest.__struct_fields__) - {
    "id", "prompt", "packed_prompt", "messages", "sampling", "stream", "timeout_ms", "resume",
    "embed", "dimensions",
}  # fmt: skip
_EMBED_FIELDS = frozenset(("model", "priority", "offline", "cache_salt", "traceparent", "ttft_ms"))


def build_submit(
    request_id: int,
    options: Mapping[str, Any],
    *,
    timeout_s: float,
    stream: bool,
    prompt: Prompt | None = None,
    messages: Messages | None = None,
) -> SubmitRequest:
    """A submit. `options` are fields of SubmitRequest (`model`, `priority`, `offline`,
    `hold_ms`, ...) and of SamplingParams (`max_tokens`, `temperature`, ...).

    InvalidRequestError names an unknown option or one of a wrong type."""
    sampling = {}
    fields = {}
    for name, value in options.items():
        if name in _REQUEST_FIELDS:
            fields[name] = value
        elif name in SamplingParams.__struct_fields__:
            sampling[name] = value
        else:
            raise InvalidRequestError(f"unknown option {name}", param=name)
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    if (prompt is None) == (messages is None):
        raise InvalidRequestError("give a prompt or messages, one of them", param="prompt")
    if prompt is not None:
        fields |= _prompt_fields(prompt)
    else:
        fields["messages"] = messages
    fields["id"] = request_id
    fields["type"] = "submit"
    fields["stream"] = stream
    fields["timeout_ms"] = max(1, int(timeout_s * 1000))
    fields["sampling"] = sampling
    return _convert(fields, SubmitRequest)


def build_embed(
    request_id: int,
    options: Mapping[str, Any],
    timeout_s: float,
    *,
    prompt: Prompt,
    dimensions: int,
) -> SubmitRequest:
    """A submit that asks for the vector of a prompt. `options` are fields of SubmitRequest."""
    for name in options:
        if name not in _EMBED_FIELDS:
            raise InvalidRequestError(f"unknown option {name}", param=name)
    fields = {
        **options, "type": "submit", "id": request_id, "stream": False, "embed": True,
        "timeout_ms": max(1, int(timeout_s * 1000)), "dimensions": dimensions,
        **_prompt_fields(prompt),
    }  # fmt: skip
    return _convert(fields, SubmitRequest)


def build_tokenize(
    request_id: int,
    model: str,
    *,
    text: str | None,
    messages: Messages | None,
    add_special_tokens: bool,
) -> TokenizeText:
    """A question for token ids."""
    fields = {
        "type": "tokenize", "id": request_id, "model": model, "text": text, "messages": messages,
        "add_special_tokens": add_special_tokens,
    }  # fmt: skip
    return _convert(fields, TokenizeText)


def build_detokenize(request_id: int, model: str, token_ids: Sequence[int]) -> DetokenizeIds:
    """A question for the text of token ids."""
    is_row = isinstance(token_ids, Iterable)
    ids = tuple(map(_plain_number, token_ids)) if is_row else token_ids
    fields = {"type": "detokenize", "id": request_id, "model": model, "token_ids": ids}
    return _convert(fields, DetokenizeIds)


def encode_request(message: ClientMessage) -> bytes:
    """The bytes of a message; InvalidRequestError for a text or number that has none."""
    try:
        return encode(message)
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"a text is no Unicode: {error.reason}") from error
    except OverflowError as error:
        place, number = next(_beyond_64_bits("", msgspec.to_builtins(message)))
        place = place.removeprefix("sampling.")
        raise InvalidRequestError(
            f"{place} must fit 64 bits, not be {shown(number)}", param=place
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"this cannot be sent: {str(error)[:200]}") from error


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the fields of a submit; many ids as bytes."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    # Numbers come out of these, too, but nobody means them as token ids.
    if isinstance(prompt, bytes | bytearray | memoryview | Mapping) or not isinstance(
        prompt, Iterable
    ):
        kind = type(prompt).__name__
        raise InvalidRequestError(f"prompt must be a text or token ids, not {kind}", param="prompt")
    ids = tuple(prompt)
    if len(ids) < PACK_FROM:
        return {"prompt": tuple(map(_plain_number, ids))}
    try:
        return {"packed_prompt": pack_tokens(ids)}
    except (OverflowError, TypeError):
        return {"prompt": ids}  # which of them is no id is said where each is looked at


def _plain_number(one: object) -> object:
    """An integer of another library as Python's own; what is none as it is, to be refused."""
    if isinstance(one, int) or not isinstance(one, SupportsIndex):
        return one
    try:
        return operator.index(one)
    except TypeError:
        return one  # of numpy and torch all numbers have the method, and whole tensors


def _beyond_64_bits(place: str, value: Any) -> Iterator[tuple[str, int]]:
    """The numbers in a value at `place` that no message can hold, each with its own place."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            if isinstance(name, int):
                yield from _beyond_64_bits(place, name)
            yield from _beyond_64_bits(f"{place}.{name}" if place else name, one)
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _beyond_64_bits(f"{place}[{index}]", one)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        yield place, value


def _convert(fields: dict[str, Any], cls: type[T]) -> T:
    try:
        return msgspec.convert(fields, cls, from_attributes=True)
    except msgspec.ValidationError as error:
        text, param = explain(str(error).replace("$.sampling.", "$."), "the request")
        raise InvalidRequestError(text, param=param) from error
