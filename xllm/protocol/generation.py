"""What a client asks a model for, and what it hears of it: submit, abort; tokens, vectors and
exactly one terminal message.
"""

from __future__ import annotations

from xllm.protocol.message import MapMessage, MapPart
from xllm.protocol.sampling import SamplingParams, TokenLogprobs

LIFE_ATTEMPTS = 1 << 16
"""Attempts that one router may make of a request; the next router's begin beyond them."""


def next_life(attempt: int) -> int:
    """The first attempt of the router that takes a request over, given the highest one seen.

    It is beyond all that the lost router can have made, whether the client saw them or not."""
    return (attempt | (LIFE_ATTEMPTS - 1)) + 1


class ContentPart(MapPart, frozen=True):
    """A typed piece of a chat message. Only `text` is accepted at present."""

    type: str
    text: str = ""


class ChatMessage(MapPart, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | tuple[ContentPart, ...] = ""
    name: str = ""


class ResumePoint(MapPart, frozen=True):
    """What a client already holds of a request that another router lost.

    `outputs`: per choice, the token ids received (none where nothing was streamed); `attempt`: the
    highest attempt seen, or, where none was, what the last submit must have begun with."""

    attempt: int
    outputs: tuple[tuple[int, ...], ...]
    seed: int


class SubmitRequest(MapMessage, tag="submit", frozen=True):
    """Ask for completions of one prompt: text, token ids, these as bytes, or chat messages."""

    id: int
    model: str = ""
    """"" stands for the only model served."""
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    chat_template_kwargs: dict[str, str | bool | int | float] = {}
    """Switches of the chat template; flat, so that a message cannot hide a tree in them."""
    sampling: SamplingParams = SamplingParams()
    stream: bool = True
    """False: no deltas, the terminal message holds all."""
    hold_ms: int = 20
    """Tokens may be held this long to travel together; 0: each as it comes."""
    timeout_ms: int = 0
    """Remaining time to the end of the answer; 0: the router's own limit."""
    priority: int = 0
    """Larger runs earlier, among requests of the same kind."""
    offline: bool = False
    """Best effort: yields to online requests."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt (and tenant)."""
    resume: ResumePoint | None = None
    traceparent: str = ""
    ttft_ms: int = 0
    """Objective for the first token, for schedulers that go by urgency; 0: the service's own."""
    tpot_ms: int = 0
    """The same for each later token."""
    embed: bool = False
    """Ask for the vector of `prompt` instead of an answer to it. `sampling` is left as it is."""
    dimensions: int = 0
    """Of a vector: its first so many numbers, made to length one again; 0: all."""
    key: str = ""
    """128 random bits in hex, drawn by the client and the same at each router that it asks: the
    request's later attempts replace its earlier ones, wherever they run. "": none."""
    session: str = ""
    """Requests of one session (and tenant) go to one instance while that is not overrun."""
    packed_prompt: bytes = b""
    """Token ids as bytes (32 bits each, little-endian), in place of `prompt`: many ids are one
    thing to copy and to check so."""


class AbortRequest(MapMessage, tag="abort", frozen=True):
    """Stop a request of this connection; its terminal message follows. Unknown ids are ignored."""

    id: int


class Usage(MapPart, frozen=True):
    """Tokens of a request: prompt, new ones over all choices, prompt tokens found cached."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TokenDelta(MapMessage, tag="delta", frozen=True):
    """New tokens of one choice. `first_index` counts the choice's output tokens from 0, so that
    a receiver can drop duplicates and late words of a replaced attempt."""

    id: int
    choice: int = 0
    attempt: int = 1
    first_index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str = ""
    """"" while the choice goes on; else stop, length or abort."""


class ChoiceResult(MapPart, frozen=True):
    """How one choice ended; with `stream=False` also all it said."""

    index: int
    finish_reason: str
    stop_reason: str | int | None = None
    """The stop string or stop id that ended it, where one did."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None


class RequestFinished(MapMessage, tag="finished", frozen=True):
    """The one terminal message of a request that ended as asked."""

    id: int
    request_id: str
    choices: tuple[ChoiceResult, ...]
    usage: Usage
    seed: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    embedding: bytes | None = None
    """The vector that was asked for: float32, little-endian, of length one. `choices` is empty."""


class RequestFailed(MapMessage, tag="failed", frozen=True):
    """The one terminal message of a request (or question) that failed or was aborted."""

    id: int
    code: str
    message: str
    request_id: str = ""
    param: str | None = None
    retry_after_ms: int = 0
    everywhere: bool = False
    """With unavailable: no other router has a better answer, since the model is asleep."""
