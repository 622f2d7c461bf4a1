"""Master and worker: step plans and step results; loading, readiness, pings.

The scheduler (in `master`) and the executor (in `worker`) never see each other: they meet here.
A plan names a new sequence in full once and later only its deltas. Sequence numbers are local
to an instance and never used again; a preempted sequence comes back as a new one.
"""

from __future__ import annotations

from enum import IntEnum

from xllm.protocol.message import ArrayMessage, ArrayPart, learn
from xllm.protocol.sampling import SamplingParams

PULSE_PERIOD_S = 0.2
"""Longest time between two pulses of a worker, whatever the period of heartbeats is: masters
judge workers by it."""


class ItemKind(IntEnum):
    """What an item of a plan asks for."""

    PREFILL = 0
    DECODE = 1
    VERIFY = 2
    ENCODE = 3
    DUMMY = 4


class NewSequence(ArrayPart, frozen=True):
    """A sequence that the worker has not seen. Its tokens are prompt_ids + output_ids.

    `block_ids` is its block table so far, cached prefix included. A fork (`parent` >= 0) takes
    its token history from that sequence instead: `prompt_ids` is then empty and `output_ids`
    replaces the parent's output."""

    seq: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    sampling: SamplingParams
    choice: int
    block_ids: tuple[int, ...] = ()
    parent: int = -1
    stop_ids: tuple[int, ...] = ()
    """Masked while fewer than `sampling.min_tokens` tokens are out."""
    model: str = ""
    adapter: str = ""
    dp_rank: int = 0
    slot: int = -1
    """Where its KV is mapped, for the whole of its life; -1: nowhere, its block table says."""
    pooling: str = ""
    """What to make one vector of its rows: last or mean; empty: nothing."""


class ItemOptions(ArrayPart, frozen=True):
    """What few items need; its own part so that the many others stay small.

    `token_ids`, else the placeholder (source_step, source_row) of a step that may still run,
    say where the item's tokens come from. `positions`: explicit positions, three axes
    flattened, where they are not start + k. `hold`: keep the KV after the last step."""

    token_ids: tuple[int, ...] = ()
    source_step: int = -1
    source_row: int = -1
    positions: tuple[int, ...] = ()
    adapter: str = ""
    dp_rank: int = 0
    mask_row: int = -1
    hold: bool = False


class StepItem(ArrayPart, frozen=True):
    """One sequence's share of a step: positions [start, start + num_tokens).

    The tokens are those of the worker's own history of the sequence, unless `options` says
    otherwise: those of a VERIFY are its last token and drafts behind it. `new_block_ids` join its
    block table before the step. `num_samples`: tokens to draw from the last row: 0 (not the
    prompt's last chunk), 1, or n, then for choices 0 to n - 1 from the same logits. A VERIFY
    draws from every row and gives what it drew up to the first draft that is something else, or
    nothing: it is to be asked again without drafts. `score_prompt`: report the logprobs of the
    prompt tokens that this item's rows predict."""

    seq: int
    kind: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...] = ()
    num_samples: int = 1
    score_prompt: bool = False
    options: ItemOptions | None = None


class MapPages(ArrayPart, frozen=True):
    """Map (or, with no pages, unmap) physical pages under a slot from a page index on."""

    slot: int
    first_page: int
    page_ids: tuple[int, ...] = ()


class StepPlan(ArrayMessage, frozen=True):
    """What one forward pass must do. Order of effects: `new` are learnt (the parent of a fork may
    be among `ended`), `ended` are forgotten, `copies` of whole blocks (source, destination) are
    made, items run; the maps are made in order for each slot, before an item that needs them."""

    step: int
    items: tuple[StepItem, ...] = ()
    new: tuple[NewSequence, ...] = ()
    ended: tuple[int, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    model: str = ""
    interrupt_epoch: int = 0
    maps: tuple[MapPages, ...] = ()


class LoadModel(ArrayMessage, frozen=True):
    """Load the weights (again after a sleep). Answered by LoadProgress and WorkerReady.

    `group`: the ranks' meeting: all of an instance's workers hear the same name and join under
    it; a new name after any of them was lost. Empty where there is one rank."""

    model: str = ""
    group: str = ""


class SleepModel(ArrayMessage, frozen=True):
    """Forget a model's sequences and what is mapped for them; with `drop_weights` its weights,
    too. Plans of it come no more until it is awake. Not answered."""

    model: str
    drop_weights: bool = False


class WakeModel(ArrayMessage, frozen=True):
    """A model that sleeps will get plans again; answered by ModelAwake once its weights are
    there. Nothing else runs while they are read."""

    model: str


class RankNotice(ArrayMessage, frozen=True):
    """What a rank tells the others before they are connected: a key and a value of the meeting
    `group`. A worker sends it to its master, who passes it on to the other ranks as it is."""

    rank: int
    group: str
    key: str
    value: bytes


class PingWorker(ArrayMessage, frozen=True):
    """Answered through the engine thread by WorkerPong."""

    nonce: int


class StopWorker(ArrayMessage, frozen=True):
    """Finish the step in flight and end as one that was replaced: whoever started this worker
    starts it again."""


MasterMessage = StepPlan | LoadModel | PingWorker | StopWorker | RankNotice | SleepModel | WakeModel


class StepResult(ArrayMessage, frozen=True):
    """What a step gave, one entry an item in the plan's order.

    `tokens[i]`: 0 to n (or k + 1) tokens. `parents[i]`: the parent row of each, for forks and
    beams. `logprob_rows[i]`: rows that item i has in the logprob frames (empty: no frames);
    rows of `score_prompt` come before those of drawn tokens. Three frames follow when
    `num_top` >= 0: int32 ids [rows, 1 + num_top], float32 logprobs [rows, 1 + num_top], both
    beginning with the token itself, and int32 ranks [rows]. `failed`: items that did not run,
    as (index, message): only those sequences end. `expert_frames`: further frames with int32
    token counts [layers, experts]. `pooled`: items that completed a sequence with `pooling`, in
    the plan's order; one more frame, the last, has their vectors: float32, little-endian,
    [items, width], of length one each. `model`: as the plan had it."""

    step: int
    tokens: tuple[tuple[int, ...], ...] = ()
    duration_ns: int = 0
    parents: tuple[tuple[int, ...], ...] = ()
    logprob_rows: tuple[int, ...] = ()
    num_top: int = -1
    failed: tuple[tuple[int, str], ...] = ()
    loads_done: tuple[int, ...] = ()
    stores_done: tuple[int, ...] = ()
    expert_frames: int = 0
    idle_ns: int = 0
    """Time between the end of the worker's step before this one and its begin; 0 for the first."""
    pooled: tuple[int, ...] = ()
    model: str = ""


class WorkerHello(ArrayMessage, frozen=True):
    """A worker's first word: who it is."""

    rank: int
    incarnation: str
    pid: int
    device: str


class LoadProgress(ArrayMessage, frozen=True):
    """Weights loaded so far."""

    loaded_bytes: int
    total_bytes: int


class KvGroup(ArrayPart, frozen=True):
    """One kind of KV of a model: bytes a token on this rank, attention window (0: full), layers."""

    name: str
    bytes_per_token: int
    window: int = 0
    num_layers: int = 0


class WorkerReady(ArrayMessage, frozen=True):
    """What is known only after loading. `eos_ids`: all ids that end a text, from
    generation_config and config. `fingerprint`: device kind, instruction set, dtype, parallel
    sizes, kernel set: equal fingerprints give bit-identical logits in deterministic mode.
    `revision`: SHA-256 (hex) over the model's configuration, the names, types and shapes of its
    tensors, and 64 bytes from the middle of each: a fine-tuned model has its parent's headers.
    `max_model_len`: prompt and output together, no more than the KV memory holds.
    `group`: of the LoadModel that this answers. `num_slots`: ranges of addresses for max_model_len
    tokens each, 0: none; `max_mappings`: what may be mapped under them, in runs of pages that
    follow each other, and one for the rest of a slot. `task`: generate or embed; with embed,
    `pooling` (last or mean) is how the rows of a text become one vector of `embedding_size`
    numbers. `more`: the same of each further model of this worker, over the same pages; then each
    has its part of the mappings."""

    rank: int
    model: str
    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    revision: str
    fingerprint: str
    kv_groups: tuple[KvGroup, ...] = ()
    device: str = ""
    dtype: str = ""
    load_s: float = 0.0
    group: str = ""
    num_slots: int = 0
    max_mappings: int = 0
    task: str = "generate"
    pooling: str = ""
    embedding_size: int = 0
    more: tuple[WorkerReady, ...] = ()
    num_experts: int = 0
    """Of each layer that has experts."""


class WorkerFailed(ArrayMessage, frozen=True):
    """Loading or a whole step failed: `code` is an error's wire code. After a failed load the
    worker exits; after a failed step (`step` >= 0, `model` as the plan had it) it goes on without
    the step's sequences."""

    rank: int
    code: str
    message: str
    step: int = -1
    model: str = ""


class ModelAwake(ArrayMessage, frozen=True):
    """A model that slept takes plans again; or, with an error's wire code, it cannot and sleeps
    on."""

    rank: int
    model: str
    code: str = ""
    message: str = ""


class WorkerPulse(ArrayMessage, frozen=True):
    """Heartbeat of the actor thread, with the engine thread's progress counter: the engine is
    frozen when `busy` and the counter stands."""

    rank: int
    counter: int
    busy: bool
    metrics: bytes = b""
    """Prometheus text of this process, now and then."""
    denied_s: float = 0.0
    """Of the time in which the counter stood, how long threads of this process wanted a CPU and
    got none; since the start."""


class WorkerPong(ArrayMessage, frozen=True):
    """Answer to PingWorker, from the engine thread."""

    rank: int
    nonce: int


WorkerMessage = (
    StepResult
    | WorkerHello
    | LoadProgress
    | WorkerReady
    | WorkerFailed
    | WorkerPulse
    | WorkerPong
    | RankNotice
    | ModelAwake
)

learn(MasterMessage, WorkerMessage)
