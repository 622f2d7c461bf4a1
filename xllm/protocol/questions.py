"""What a client asks a router about itself, its cluster, its models and its tokenizers, each with
its answer. `failed` is the answer to a question that cannot be answered.
"""

from __future__ import annotations

from xllm.protocol.generation import ChatMessage
from xllm.protocol.message import MapMessage, MapPart


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


class Ping(MapMessage, tag="ping", frozen=True):
    """Ask whether the router's own loop runs: a socket alone proves less. Best sent first: from
    then on the router says, by a further `pong`, when it stops."""

    id: int


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
    """Of an instance: loading, ready, asleep, draining or failed, as it says; refusing, suspect,
    disconnected or unknown, as the router finds; lost: it did not leave, and its record is gone."""
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
