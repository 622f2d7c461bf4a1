"""Router and master: admit, cancel, drain, role; tokens and how each request ended."""

from __future__ import annotations

from xllm.protocol.bus import SnapshotOfBlocks
from xllm.protocol.message import ArrayMessage, ArrayPart, learn
from xllm.protocol.sampling import SamplingParams, TokenLogprobs

ROLES = ("both", "prefill", "decode")
"""What an instance may be for."""
PASSED_TOKENS = 2
"""With so many tokens more a choice is past the steps that were under way when its worker ended:
one for each, and there are two at most."""


class AdmitRequest(ArrayMessage, frozen=True):
    """Run this request. All text is tokens here; bounds were checked, the seed is drawn.

    `outputs`: per choice, the output ids that already exist (after a migration or a resume):
    the border between prompt and output matters to penalties, min/max tokens and usage.
    `block_hashes`: content hashes of the full blocks of the prompt, 32 bytes each, computed
    once by the router. `stop_ids` joins the model's end-of-text ids (unless ignored) and the
    request's own. `stages`: the route [(role, instance), ...] of which this instance is one.
    """

    request_id: str
    attempt: int
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    block_hashes: bytes = b""
    outputs: tuple[tuple[int, ...], ...] = ()
    salt: bytes = b""
    """Root of this request's hash chain after model, tenant and client salt."""
    adapter: str = ""
    priority: int = 0
    offline: bool = False
    timeout_ms: int = 0
    stages: tuple[tuple[str, str], ...] = ()
    media_hashes: tuple[bytes, ...] = ()
    traceparent: str = ""
    tenant: str = ""
    """Who asks: what fairness is between."""
    ttft_ms: int = 0
    tpot_ms: int = 0
    """Objectives for the first token and for each later one; 0: the instance's own."""
    embed: bool = False
    """Asks for the prompt's vector and for no token: `sampling` has max_tokens 0 and n 1."""
    packed_prompt: bytes = b""
    """The prompt's ids in 32 bits each, little-endian, in place of `prompt_ids`."""
    alone: bool = False
    """Runs in steps that no other request shares until it has passed where workers ended under it:
    they ended so twice, and it may be the reason."""


class CancelRequest(ArrayMessage, frozen=True):
    """Stop a request, or one of its choices (`choice` >= 0). `attempt` as admitted: a cancel of
    an older attempt does nothing. No `RequestEnded` follows a cancel of the whole request:
    the router has already told its client."""

    request_id: str
    attempt: int
    choice: int = -1


class DrainInstance(ArrayMessage, frozen=True):
    """Admit nothing more, finish what runs within `timeout_ms`, then report `Drained`."""

    timeout_ms: int
    epoch: int = 0


class AssignRole(ArrayMessage, frozen=True):
    """The leader's word on what this instance is for. Lower epochs are refused; those above
    MAX_BASE (see epochs) are ignored unless the registry names them."""

    role: str
    epoch: int


class ReleaseHold(ArrayMessage, frozen=True):
    """The KV of a held (prefilled) sequence is no longer needed here."""

    request_id: str
    attempt: int


class QuerySnapshot(ArrayMessage, frozen=True):
    """After a gap in a publisher's sequence: send the full state (the Clone pattern)."""

    after_seq: int = 0


class ProbeInstance(ArrayMessage, frozen=True):
    """Prove the data path: the master answers `ProbeAnswer` once its workers answered a ping, or
    at once where a step is under way and moves."""

    nonce: int


class SetSleep(ArrayMessage, frozen=True):
    """Put the model to sleep: take nothing more, end what runs within `timeout_ms`, give back its
    pages and, with `drop_weights`, its weights; or wake it. Answered by SleepSet."""

    nonce: int
    asleep: bool
    timeout_ms: int = 0
    drop_weights: bool = False


class PingInstance(ArrayMessage, frozen=True):
    """Does this connection carry words both ways? The master's loop answers at once with an
    InstancePong of the same number, whatever its workers do."""

    number: int


class QueryTokens(ArrayMessage, frozen=True):
    """Which tokens were drawn of that request so far? A HeldTokens of the same number answers."""

    number: int
    request_id: str


InstanceRequest = (
    AdmitRequest
    | CancelRequest
    | DrainInstance
    | AssignRole
    | ReleaseHold
    | QuerySnapshot
    | ProbeInstance
    | SetSleep
    | PingInstance
    | QueryTokens
)


class TokenItem(ArrayPart, frozen=True):
    """New tokens of one choice of one attempt; `first_index` counts output tokens from 0.

    `finish_reason`: "" while it goes on, else stop or length; a stop id that ended the choice
    is the last of `token_ids` and `stop_id` names it."""

    request_id: str
    choice: int
    attempt: int
    first_index: int
    token_ids: tuple[int, ...]
    finish_reason: str = ""
    stop_id: int = -1
    logprobs: tuple[TokenLogprobs, ...] | None = None


class PromptScores(ArrayPart, frozen=True):
    """Logprobs of a piece of the prompt: entry k is for position `first_position` + k."""

    request_id: str
    attempt: int
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


class PooledVector(ArrayPart, frozen=True):
    """The vector of a request that embeds: float32, little-endian, of length one."""

    request_id: str
    attempt: int
    vector: bytes


class RequestEnded(ArrayPart, frozen=True):
    """The master's one terminal word on an attempt. `code` "" is success (every choice has its
    finish reason); else an error's wire code with its message."""

    request_id: str
    attempt: int
    code: str = ""
    message: str = ""
    param: str = ""
    cached_tokens: int = 0
    blameless: bool = False
    """With worker_lost: somebody ended the worker, and no request is the reason."""
    shared: bool = False
    """With worker_lost: other requests were in the steps under way, or open where a master broke,
    and one of them may be the reason. With another code: it is that of a whole step, which had
    others in it."""


class TokenBatch(ArrayMessage, frozen=True):
    """All that one step gave one router: tokens first, ends after them."""

    items: tuple[TokenItem, ...] = ()
    ended: tuple[RequestEnded, ...] = ()
    prompt_scores: tuple[PromptScores, ...] = ()
    vectors: tuple[PooledVector, ...] = ()


class PrefillDone(ArrayMessage, frozen=True):
    """The prompt's KV is computed and held; the router now chooses who decodes."""

    request_id: str
    attempt: int
    num_tokens: int
    hold_ms: int


class Drained(ArrayMessage, frozen=True):
    """Nothing runs here any more."""

    num_aborted: int = 0


class ProbeAnswer(ArrayMessage, frozen=True):
    """The data path to the device works; `step_age_ms` is the age of the worker's last word."""

    nonce: int
    ok: bool
    step_age_ms: int = 0


class SleepSet(ArrayMessage, frozen=True):
    """The model sleeps, or is awake, as was asked; with an error's wire code it is not."""

    nonce: int
    code: str = ""
    message: str = ""


class EpochRefused(ArrayMessage, frozen=True):
    """A command carried an older epoch than the highest seen."""

    epoch: int
    highest: int


class FrameRefused(ArrayMessage, frozen=True):
    """The last frames did not decode."""

    message: str


class InstancePong(ArrayMessage, frozen=True):
    """The master heard that ping."""

    number: int


class HeldTokens(ArrayMessage, frozen=True):
    """The tokens of a request that runs here, by choice: none of those that have ended or not
    begun, and no choice at all where it is unknown."""

    number: int
    outputs: tuple[tuple[int, ...], ...] = ()


InstanceReply = (
    TokenBatch
    | PrefillDone
    | Drained
    | ProbeAnswer
    | EpochRefused
    | FrameRefused
    | SnapshotOfBlocks
    | SleepSet
    | InstancePong
    | HeldTokens
)

learn(InstanceRequest, InstanceReply)
