"""Publishers and routers: heartbeats, KV events, presence, the leader's words.

Each message carries (publisher, incarnation, seq), seq counting from 1 for each publisher and
topic: a gap means "ask for a snapshot", never "guess". The topic is the first frame.
"""

from __future__ import annotations

from xllm.protocol.message import ArrayMessage, ArrayPart, learn

MAX_EXPERT_LOAD_BYTES = 4096
"""Of an instance's report of how its experts are used."""


class InstanceLoad(ArrayPart, frozen=True):
    """How busy an instance is, at the time of the heartbeat."""

    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    waiting_tokens: int = 0
    """Prompt tokens that still have to be computed, waiting and running sequences together."""
    running_tokens: int = 0
    """KV tokens held by running sequences."""
    num_offline: int = 0


class InstanceLatency(ArrayPart, frozen=True):
    """Seconds, over the time since the last heartbeat; 0 where nothing happened."""

    ttft_mean_s: float = 0.0
    ttft_max_s: float = 0.0
    tpot_mean_s: float = 0.0
    tpot_max_s: float = 0.0
    step_mean_s: float = 0.0


class BlockEvents(ArrayPart, frozen=True):
    """Changes of the cached blocks, as concatenated 32-byte content hashes."""

    stored: bytes = b""
    removed: bytes = b""
    tier: str = "device"


class WorkerState(ArrayPart, frozen=True):
    """A worker of an instance, as its master sees it."""

    name: str
    state: str
    """starting, loading, ready or failed."""
    silent_ms: int = 0
    """Since its last word, of one that is ready."""
    device: str = ""


class InstanceHeartbeat(ArrayMessage, frozen=True):
    """A master is alive, and how."""

    publisher: str
    incarnation: str
    seq: int
    state: str
    """loading, ready, draining or failed."""
    role: str = "both"
    load: InstanceLoad = InstanceLoad()
    latency: InstanceLatency = InstanceLatency()
    events: tuple[BlockEvents, ...] = ()
    expert_load: bytes = b""
    """How evenly the experts are used, now and then: JSON, MAX_EXPERT_LOAD_BYTES at most."""
    metrics: bytes = b""
    """Prometheus text of master and workers, about once a second."""
    message: str = ""
    workers: tuple[WorkerState, ...] = ()
    num_cached: int = -1
    """Blocks that are cached once the events happened; -1: not said."""
    digest: int = 0
    """XOR of the first eight bytes of their hashes, each as a little-endian number, never 0."""


class DaemonHeartbeat(ArrayMessage, frozen=True):
    """A KV cache daemon is alive, and how full its tiers are."""

    publisher: str
    incarnation: str
    seq: int
    dram_blocks: int = 0
    dram_bytes: int = 0
    dram_capacity_bytes: int = 0
    events: tuple[BlockEvents, ...] = ()
    metrics: bytes = b""
    num_cached: int = -1
    """Distinct blocks that are stored once the events happened, and their digest: see
    InstanceHeartbeat."""
    digest: int = 0


class TenantUse(ArrayPart, frozen=True):
    """What a tenant that has limits does at one router."""

    tenant: str
    """As limits know it."""
    num_open: int = 0
    """Requests that are open there."""
    num_requests: int = 0
    """That came since the router's last word, and `num_tokens`: that were used."""
    num_tokens: int = 0


class RouterPresence(ArrayMessage, frozen=True):
    """A router is alive: its requests in flight by instance, and its standing."""

    publisher: str
    incarnation: str
    seq: int
    inflight: tuple[tuple[str, int], ...] = ()
    leader_epoch: int = 0
    roles: tuple[tuple[str, str], ...] = ()
    metrics: bytes = b""
    tenants: tuple[TenantUse, ...] = ()
    """Of its tenants that have limits."""
    era: str = ""
    """Of a leader that knows what the registry has: the registry's era, under which roles and
    objectives stand there as this word says."""
    ttft_ms: int = 0
    tpot_ms: int = 0
    highest_epoch: int = 0
    """That it has heard of: a leader of a lower one is none, whatever the registry says that may
    have lost its data."""


class SnapshotOfBlocks(ArrayMessage, frozen=True):
    """Answer to QuerySnapshot: all cached blocks as of `seq`."""

    publisher: str
    incarnation: str
    seq: int
    hashes: bytes = b""
    tier: str = "device"


BusMessage = InstanceHeartbeat | DaemonHeartbeat | RouterPresence | SnapshotOfBlocks

learn(BusMessage)
