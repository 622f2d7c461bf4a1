"""Client and router: submit, abort, questions; tokens and exactly one terminal message.

`id` is the client's own number for a request, unique among its open ones on a connection; the
server's `request_id` (128 random bits, hex) is what logs and other processes use. Deadlines
travel as remaining milliseconds. docs/protocol.md specifies these bytes for other languages.
"""

from __future__ import annotations

from xllm.protocol.message import MapMessage, MapPart, learn
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


class ListModels(MapMessage, tag="list_models", frozen=True):
    """Ask which models are served."""

    id: int


class QueryHealth(MapMessage, tag="query_health", frozen=True):
    """Ask how the service is; `probe` sends one token through the data path first."""

    id: int
    probe: bool = False


class QueryStatus(MapMessage, tag="query_status", frozen=True):
    """Ask for the router's view of the cluster: processes, roles, load."""

    id: int


class TokenizeText(MapMessage, tag="tokenize", frozen=True):
    """Ask for the token ids of a text, or of chat messages through the template."""

    id: int
    model: str = ""
    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    add_special_tokens: bool = True


class DetokenizeIds(MapMessage, tag="detokenize", frozen=True):
    """Ask for the text of token ids."""

    id: int
    model: str = ""
    token_ids: tuple[int, ...] = ()


class SetModelSleep(MapMessage, tag="set_sleep", frozen=True):
    """Put a model to sleep, or wake it, at all its instances. What runs has `timeout_ms` to end.
    `drop_weights`: waking reads them again."""

    id: int
    model: str
    asleep: bool
    timeout_ms: int = 0
    drop_weights: bool = False


class Ping(MapMessage, tag="ping", frozen=True):
    """Ask whether the router's own loop runs: a socket alone proves less. Best sent first: from
    then on the router says, by a further `pong`, when it stops."""

    id: int


class SetRole(MapMessage, tag="set_role", frozen=True):
    """Say what an instance is for: `both`, `prefill` or `decode`. For the router that leads."""

    id: int
    instance: str
    role: str


class SetObjectives(MapMessage, tag="set_objectives", frozen=True):
    """Set the objectives of requests that name none, at all routers; 0: each instance's own again,
    nil: as it is. For the router that leads."""

    id: int
    ttft_ms: int | None = 0
    tpot_ms: int | None = 0


ClientMessage = (
    SubmitRequest
    | AbortRequest
    | ListModels
    | QueryHealth
    | QueryStatus
    | TokenizeText
    | DetokenizeIds
    | SetModelSleep
    | Ping
    | SetRole
    | SetObjectives
)


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


class ModelInfo(MapPart, frozen=True):
    """A model as clients see it."""

    name: str
    max_model_len: int
    vocab_size: int = 0
    revision: str = ""
    ready: bool = True
    task: str = "generate"
    """generate or embed: what it can be asked for."""
    embedding_size: int = 0
    """Numbers of a vector, where it embeds."""


class ModelList(MapMessage, tag="models", frozen=True):
    """Answer to `list_models`."""

    id: int
    models: tuple[ModelInfo, ...]


class HealthReport(MapMessage, tag="health", frozen=True):
    """Answer to `query_health`."""

    id: int
    live: bool
    ready: bool
    degraded: tuple[str, ...] = ()
    version: str = ""


class ProcessStatus(MapPart, frozen=True):
    """One process of the cluster as the router sees it."""

    name: str
    kind: str
    """router, instance, worker or daemon."""
    incarnation: str = ""
    role: str = ""
    model: str = ""
    state: str = "ready"
    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    heartbeat_age_ms: int = 0
    epoch: int = 0
    """Of the router that leads (its role is then "leader"): of its leadership."""
    breaker: str = ""
    """open or half-open: this router keeps requests from an instance that failed them."""


class StatusReport(MapMessage, tag="status", frozen=True):
    """Answer to `query_status`."""

    id: int
    processes: tuple[ProcessStatus, ...]


class TokenizedText(MapMessage, tag="tokenized", frozen=True):
    """Answer to `tokenize`."""

    id: int
    token_ids: tuple[int, ...]
    max_model_len: int = 0


class DetokenizedText(MapMessage, tag="detokenized", frozen=True):
    """Answer to `detokenize`."""

    id: int
    text: str


class BadMessage(MapMessage, tag="bad_message", frozen=True):
    """The last frames were no message of this conversation."""

    message: str


class ModelSleepSet(MapMessage, tag="sleep_set", frozen=True):
    """Answer to `set_sleep`: the model sleeps, or takes requests."""

    id: int
    model: str
    asleep: bool


class RouterAddress(MapPart, frozen=True):
    """Where another router of the cluster listens for clients, and its key where it has one."""

    endpoint: str
    public_key: str = ""


class Pong(MapMessage, tag="pong", frozen=True):
    """Answer to `ping`; also sent unasked (`id` 0) to who has pinged when the router stops."""

    id: int
    is_stopping: bool = False
    """It takes nothing new: its clients should go on at another router."""
    routers: tuple[RouterAddress, ...] = ()
    """The other routers that it knows."""


class RoleSet(MapMessage, tag="role_set", frozen=True):
    """Answer to `set_role`: the instance is told with the next heartbeat."""

    id: int
    instance: str
    role: str


class ObjectivesSet(MapMessage, tag="objectives_set", frozen=True):
    """Answer to `set_objectives`: the registry has them. Both, whichever was set."""

    id: int
    ttft_ms: int = 0
    tpot_ms: int = 0


RouterMessage = (
    TokenDelta
    | RequestFinished
    | RequestFailed
    | ModelList
    | HealthReport
    | StatusReport
    | TokenizedText
    | DetokenizedText
    | BadMessage
    | ModelSleepSet
    | Pong
    | RoleSet
    | ObjectivesSet
)

learn(ClientMessage, RouterMessage)
