"""The bodies of generating requests: typed, bounded in shape, closed to what is dangerous.

Knows JSON, not the service. Unknown fields are ignored, as OpenAI's clients expect; fields that
other servers let a client use to change templates, paths or code, and features that are not
here, are refused by name rather than silently dropped.
"""

from __future__ import annotations

import json
import operator
from typing import Annotated, Literal, TypeVar

import msgspec

from xllm.errors import InvalidRequestError
from xllm.protocol.wrong_value import explain

T = TypeVar("T")

ABSENT = msgspec.Raw(b"")
MAX_KEY_CHARS = 24
"""So much is told of a key that is no number."""
Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer of 64 bits: nothing larger is passed on, whatever the field's own bound is."""

REFUSED: dict[str, tuple[bytes, ...]] = {
    "add_generation_prompt": (b"true",),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (b"[]",),
    "chat_template": (),
    "continue_final_message": (b"false",),
    "documents": (b"[]",),
    "function_call": (b'"none"',),
    "functions": (b"[]",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "lora_path": (),
    "mm_processor_kwargs": (b"{}",),
    "modalities": (b'["text"]',),
    "model_path": (),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "tokenizer": (),
    "tool_choice": (b'"none"', b'"auto"'),
    "tools": (b"[]",),
    "web_search_options": (),
}
"""Fields that only these values (or null) may have."""

_REFUSED_FIELDS = operator.attrgetter(*REFUSED)
_ALL_ABSENT = (ABSENT,) * len(REFUSED)


class RefusedFields(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What no client may ask for."""

    add_generation_prompt: msgspec.Raw = ABSENT
    allowed_token_ids: msgspec.Raw = ABSENT
    audio: msgspec.Raw = ABSENT
    bad_words: msgspec.Raw = ABSENT
    chat_template: msgspec.Raw = ABSENT
    continue_final_message: msgspec.Raw = ABSENT
    documents: msgspec.Raw = ABSENT
    function_call: msgspec.Raw = ABSENT
    functions: msgspec.Raw = ABSENT
    guided_choice: msgspec.Raw = ABSENT
    guided_grammar: msgspec.Raw = ABSENT
    guided_json: msgspec.Raw = ABSENT
    guided_regex: msgspec.Raw = ABSENT
    lora_path: msgspec.Raw = ABSENT
    mm_processor_kwargs: msgspec.Raw = ABSENT
    modalities: msgspec.Raw = ABSENT
    model_path: msgspec.Raw = ABSENT
    prediction: msgspec.Raw = ABSENT
    prompt_embeds: msgspec.Raw = ABSENT
    prompt_logprobs: msgspec.Raw = ABSENT
    structured_outputs: msgspec.Raw = ABSENT
    tokenizer: msgspec.Raw = ABSENT
    tool_choice: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    web_search_options: msgspec.Raw = ABSENT

    def check_refused(self) -> None:
        """InvalidRequestError for the first field that asks for something."""
        if _REFUSED_FIELDS(self) == _ALL_ABSENT:
            return
        for name, harmless in REFUSED.items():
            raw = getattr(self, name)
            if raw is ABSENT:
                continue
            value = bytes(raw).strip()
            if value != b"null" and value not in harmless:
                raise InvalidRequestError(f"{name} is not supported", param=name)


class ResponseFormat(msgspec.Struct, frozen=True, gc=False):
    """Only `text` is served."""

    type: str


class StreamOptions(msgspec.Struct, frozen=True, gc=False):
    """How a stream is told."""

    include_usage: bool | None = None


class GenerationBody(RefusedFields, frozen=True, kw_only=True, gc=False):
    """What chat and plain completions have in common. None: not given."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: ResponseFormat | None = None
    priority: Int | None = None
    offline: bool | None = None
    cache_salt: str | None = None
    ttft_ms: Int | None = None
    tpot_ms: Int | None = None
    user: str | None = None
    metadata: dict[str, msgspec.Raw] | None = None


class ContentBody(msgspec.Struct, frozen=True, gc=False):
    """A part of a message's content."""

    type: str
    text: str | None = None


class MessageBody(msgspec.Struct, frozen=True, gc=False):
    """One turn."""

    role: str
    content: str | list[ContentBody] | None = None
    name: str | None = None
    tool_calls: msgspec.Raw = ABSENT
    function_call: msgspec.Raw = ABSENT


class ChatBody(GenerationBody, frozen=True, kw_only=True, gc=False):
    """POST /v1/chat/completions."""

    messages: list[MessageBody]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    chat_template_kwargs: dict[str, str | bool | int | float] | None = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True, gc=False):
    """POST /v1/completions. A prompt is a text or a list of token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: Int | None = None
    best_of: Int | None = None
    suffix: str | None = None


class IdsBody(CompletionBody, frozen=True, kw_only=True, gc=False):
    """The same where the prompt is one list of ids, which is read at twice the speed."""

    prompt: tuple[int, ...]  # type: ignore[assignment]  # narrower, but a tuple


class PackedBody(CompletionBody, frozen=True, kw_only=True, gc=False):
    """The same with ids that were read already (see token_bytes)."""

    prompt: bytes  # type: ignore[assignment]  # no list at all


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """POST /v1/embeddings. An input is a text or a list of token ids. `user` is ignored."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None
    priority: Int | None = None
    offline: bool | None = None
    cache_salt: str | None = None
    ttft_ms: Int | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: str = ""
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """POST /detokenize."""

    model: str = ""
    tokens: list[int]


class BiasBody(msgspec.Struct, frozen=True, gc=False):
    """The keys of a logit_bias, whatever they are."""

    logit_bias: dict[str, msgspec.Raw]


def _wrong_key(data: bytes) -> str | None:
    """The begin of the first key of a body's logit_bias that is no number; None where none is
    found: the body may be no JSON behind it, or have the field twice."""
    try:
        keys = msgspec.json.decode(data, type=BiasBody).logit_bias
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    for key in keys:
        try:
            msgspec.json.decode(msgspec.json.encode({key: 0}), type=dict[int, int])
        except msgspec.MsgspecError:
            return key[:MAX_KEY_CHARS]
    return None


def _why_no_json(data: bytes, told: str) -> str:
    """What the decoder says, but where it is wrong: it counts bytes that are no UTF-8 from the
    beginning of their string, and takes a string that ends in half a character for a cut body."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    if "truncated" in told:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return told
        return "a surrogate in a string stands alone"
    return told


def decode_body(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """A body as its type, or InvalidRequestError that names the field. Of a key that stands
    twice, the last value holds."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        text, param = explain(str(error), "the body")
        if param == "logit_bias" and text.startswith("each key"):
            key = _wrong_key(data)
            text = "logit_bias must have token ids as keys"
            text += "" if key is None else f", not {key!r}"
        raise InvalidRequestError(text, param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if not data.strip():
            raise InvalidRequestError("the body is empty, and must be a JSON object") from error
        why = _why_no_json(data, str(error)[:200])
        raise InvalidRequestError(f"the body is not valid JSON: {why}") from error
