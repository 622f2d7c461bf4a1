"""Every bound of a request, checked before anything is allocated for it.

Pure: knows limits and the model's facts, nothing of tokenizers, tenants or instances. Each
refusal names the field and its bound. What passed here cannot harm a master or a worker.
"""

from __future__ import annotations

import re

import numpy as np

from xllm.config.router import RouterSettings
from xllm.errors import ContextLengthError, InvalidRequestError
from xllm.protocol.generation import ChatMessage, ResumePoint, SubmitRequest
from xllm.protocol.native.token_ids import load
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import TOKEN_BYTES, pack_tokens, unpack_tokens
from xllm.router.embedding import check_embedding
from xllm.router.foreign_ids import foreign_id
from xllm.router.model_facts import ModelFacts, refuse
from xllm.router.sampling_bounds import MAX_SEED, check_sampling
from xllm.router.text.template import MAX_KWARG_CHARS, TEMPLATE_KWARGS

MAX_MESSAGES = 4096
MAX_SALT_CHARS = 128
MAX_SESSION_CHARS = 256
MAX_PRIORITY = 1 << 31
MAX_TRACEPARENT_CHARS = 256
MAX_OBJECTIVE_MS = 3_600_000
ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
_SALT = re.compile(r"[A-Za-z0-9._~+/=-]*")
_KEY = re.compile(r"[0-9a-f]{32}")


def check_request(
    request: SubmitRequest,
    limits: RouterSettings,
    facts: ModelFacts,
    known_sampling: SamplingParams | None = None,
) -> bytes:
    """Raise RequestError for the first field out of its bound. `known_sampling` are parameters
    that passed under the same limits and facts: most requests ask for those of the one before.
    Returns the bytes of a prompt of ids (see token_bytes), which show its bounds; else none."""
    check_embedding(request, facts.embedding_size)
    packed = request.packed_prompt
    given = (request.prompt is not None) + (request.messages is not None) + bool(packed)
    if given != 1:
        raise InvalidRequestError(
            f"give one of prompt (or packed_prompt) and messages, not {given}", param="prompt"
        )
    num_new = 0 if request.embed else 1
    if packed:
        check_packed(packed, facts, num_new)
    elif request.prompt is not None:
        packed = check_prompt(request.prompt, facts, num_new)
    elif request.messages is not None:
        check_messages(request.messages, facts)
        check_template_kwargs(request)
    if request.sampling != known_sampling:
        check_sampling(request.sampling, limits, facts)
    if not 0 <= request.hold_ms <= 1000:
        raise refuse("hold_ms", f"must be from 0 to 1000, not {request.hold_ms}")
    if request.timeout_ms < 0:  # more than router.timeout_s is taken for that
        raise refuse("timeout_ms", f"must be at least 0, not {request.timeout_ms}")
    if abs(request.priority) >= MAX_PRIORITY:
        raise refuse("priority", f"must be within {MAX_PRIORITY} of 0")
    for param, objective in (("ttft_ms", request.ttft_ms), ("tpot_ms", request.tpot_ms)):
        if not 0 <= objective <= MAX_OBJECTIVE_MS:
            raise refuse(param, f"must be from 0 to {MAX_OBJECTIVE_MS}, not {objective}")
    if len(request.cache_salt) > MAX_SALT_CHARS or not _SALT.fullmatch(request.cache_salt):
        raise refuse("cache_salt", f"must be at most {MAX_SALT_CHARS} letters, digits or ._~+/=-")
    if len(request.session) > MAX_SESSION_CHARS:
        raise refuse("session", f"must have at most {MAX_SESSION_CHARS} characters")
    if len(request.traceparent) > MAX_TRACEPARENT_CHARS:
        raise refuse("traceparent", f"must have at most {MAX_TRACEPARENT_CHARS} characters")
    if request.key and not _KEY.fullmatch(request.key):
        raise refuse("key", "must be 32 hexadecimal digits")
    if request.resume is not None:
        check_resume(request.resume, request.sampling, facts)
    return packed


def check_prompt(prompt: str | tuple[int, ...], facts: ModelFacts, num_new: int = 1) -> bytes:
    """A prompt's size and ids; text by its bytes, before it is tokenized. `num_new`: tokens that
    must fit behind it. Returns ids as bytes."""
    if not prompt:
        raise refuse("prompt", "must not be empty")
    if isinstance(prompt, str):
        check_text_bytes("prompt", prompt, facts)
        return b""
    if len(prompt) + num_new > facts.max_model_len:
        raise too_long(len(prompt), num_new, facts.max_model_len, "at least ")
    try:
        packed = pack_tokens(prompt)  # refuses what is below 0
        if _largest(packed) < facts.vocab_size:
            return packed
    except OverflowError:
        pass  # neither is an id of any model
    raise foreign_id("prompt", prompt, facts.vocab_size)


def check_packed(packed: bytes, facts: ModelFacts, num_new: int) -> None:
    """The same for ids that come as bytes."""
    num_ids, rest = divmod(len(packed), TOKEN_BYTES)
    if rest:
        raise refuse("packed_prompt", f"must have {TOKEN_BYTES} bytes an id, not {len(packed)}")
    if num_ids + num_new > facts.max_model_len:
        raise too_long(num_ids, num_new, facts.max_model_len, "at least ")
    if _largest(packed) >= facts.vocab_size:
        raise foreign_id("prompt", unpack_tokens(packed), facts.vocab_size)


def _largest(packed: bytes) -> int:
    native = load()
    return int(np.frombuffer(packed, "<u4").max()) if native is None else native.largest(packed)


def check_text_bytes(param: str, text: str, facts: ModelFacts) -> None:
    """A text of more bytes than the context can hold is refused without tokenizing it."""
    bound = facts.max_model_len * facts.longest_token_bytes
    if len(text) > bound or (4 * len(text) > bound and len(_utf8(param, text)) > bound):
        raise ContextLengthError(
            f"{param} has more than {bound} bytes, which cannot fit the context of "
            f"{facts.max_model_len} tokens",
            param=param,
        )
    if not text.isascii():
        _utf8(param, text)


def check_messages(messages: tuple[ChatMessage, ...], facts: ModelFacts) -> None:
    """Roles and contents of a conversation; their bytes together."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise refuse("messages", f"must be from 1 to {MAX_MESSAGES} messages")
    num_chars = 0
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise refuse(f"messages[{index}].role", f"must be one of {', '.join(sorted(ROLES))}")
        content = message.content
        if not isinstance(content, str):
            for part in content:
                if part.type != "text":
                    raise refuse(f"messages[{index}].content", "must hold parts of type text only")
            content = "".join([part.text for part in content])
        num_chars += len(content)
        check_text_bytes(f"messages[{index}].content", content, facts)
        check_text_bytes(f"messages[{index}].name", message.name, facts)
    bound = facts.max_model_len * facts.longest_token_bytes
    if num_chars > bound:
        raise ContextLengthError(
            f"messages have more than {bound} bytes, which cannot fit the context of "
            f"{facts.max_model_len} tokens",
            param="messages",
        )


def check_template_kwargs(request: SubmitRequest) -> None:
    """Only known switches reach a template."""
    for name, value in request.chat_template_kwargs.items():
        kind = TEMPLATE_KWARGS.get(name)
        if kind is None:
            raise InvalidRequestError(
                f"chat_template_kwargs may hold {', '.join(sorted(TEMPLATE_KWARGS))} only",
                param="chat_template_kwargs",
            )
        if type(value) is not kind or (isinstance(value, str) and len(value) > MAX_KWARG_CHARS):
            raise refuse(f"chat_template_kwargs.{name}", f"must be a {kind.__name__}")


def check_resume(point: ResumePoint, params: SamplingParams, facts: ModelFacts) -> None:
    """What a client says it holds already."""
    if not 1 <= point.attempt < 1 << 31:
        raise refuse("resume.attempt", "must be from 1 to 2**31 - 1")
    if not 0 <= point.seed <= MAX_SEED:
        raise refuse("resume.seed", "must be from 0 to 2**64 - 1")
    if len(point.outputs) != params.n:
        raise refuse("resume.outputs", f"must be one for each of the {params.n} choices")
    most = params.max_tokens or facts.max_model_len
    for choice, ids in enumerate(point.outputs):
        if len(ids) > min(most, facts.max_model_len):
            raise refuse("resume.outputs", f"must have at most {most} tokens (max_tokens)")
        if ids and (min(ids) < 0 or max(ids) >= facts.vocab_size):
            raise foreign_id(f"resume.outputs[{choice}]", ids, facts.vocab_size)


def check_resumed_length(point: ResumePoint, max_tokens: int) -> None:
    """The same, once it is known how many tokens the answer may have."""
    if max(map(len, point.outputs), default=0) > max_tokens:
        raise refuse("resume.outputs", f"must have at most {max_tokens} tokens (max_tokens)")


def check_context(
    num_prompt_tokens: int, max_tokens: int | None, min_tokens: int, max_model_len: int
) -> int:
    """The resolved max_tokens of a prompt that was tokenized; ContextLengthError with the
    numbers where prompt and output do not fit."""
    left = max_model_len - num_prompt_tokens
    wanted = 1 if max_tokens is None else max_tokens
    if wanted > left:
        raise too_long(num_prompt_tokens, wanted, max_model_len)
    resolved = left if max_tokens is None else max_tokens
    if min_tokens > resolved:
        raise refuse("min_tokens", f"must be at most max_tokens, which is {resolved}")
    return resolved


def too_long(
    num_prompt_tokens: int, max_tokens: int, max_model_len: int, least: str = ""
) -> ContextLengthError:
    """The error with its numbers. `least`: how they are bounds, where more may be asked for."""
    return ContextLengthError(
        f"the context is {max_model_len} tokens; this asks for {least}"
        f"{num_prompt_tokens + max_tokens}: "
        f"{num_prompt_tokens} of the prompt and {least}{max_tokens} of output",
        param="max_tokens" if num_prompt_tokens < max_model_len else "prompt",
    )


def _utf8(param: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise refuse(param, "must be valid Unicode text") from error
