"""The settings of every role. One section a dataclass; `Settings` holds them all.

A setting is named `section.field`: flag `--section-field`, variable `XLLM_SECTION_FIELD`, key
`field` of table `[section]` in the TOML file. `load` merges them and checks the bounds.
"""

from __future__ import annotations

import dataclasses

from xllm.config.admission import AdmissionSettings
from xllm.config.chaos import ChaosSettings
from xllm.config.etcd import EtcdSettings
from xllm.config.field import setting
from xllm.config.kv_index import KvIndexSettings
from xllm.config.routing import POLICIES, RoutingSettings
from xllm.config.scheduling import DRAFTING, FAIRNESS, PREEMPTION, STRATEGIES


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
    """What all processes of a cluster agree on."""

    name: str = setting("default", "Name of the cluster: the root of its registry keys.")
    registry: str = setting(
        "",
        "Address of the registry: ipc://... of a launcher, tcp://host:port[;key=...] of "
        "`xllm registry`, or etcd://host:port[,host:port] (etcds:// with TLS).",
    )
    launcher: str = setting(
        "", "Where this process reports its start (set by the launcher); empty: nowhere."
    )
    run_dir: str = setting(
        "", "Directory for sockets and locks (serve: of run-* directories); empty: one is made."
    )
    keys_dir: str = setting("", "Directory with this node's CURVE keys and the allow-list.")
    heartbeat_s: float = setting(
        0.2, "Period of heartbeats on the bus.", unit="s", low=0.01, high=10
    )
    lease_s: float = setting(5.0, "Time to live of registrations.", unit="s", low=2, high=120)
    registry_wait_s: float = setting(
        60.0, "Time that the registry gets to answer at a start.", unit="s", low=0.1, high=3600
    )
    shutdown_s: float = setting(
        15.0, "Time that open requests get to finish at a shutdown.", unit="s", low=0, high=600
    )
    log_level: str = setting(
        "info", "Least severe events to log.", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting(
        "text", "One event a line, for people or for machines.", choices=("text", "json")
    )
    log_dir: str = setting("", "Directory for one log file a process; empty: standard error.")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which model is served and under what name."""

    path: str = setting("", "Model directory or hub id; empty: the bundled demo model.")
    name: str = setting("", "Name that clients use; empty: the last part of the path.")
    more: str = setting(
        "",
        "Further models for the same worker and memory (docs/xtensor.md): PATH or NAME=PATH, "
        "separated by commas. All other settings hold for each.",
    )
    revision: str = setting("", "Hub revision to download; empty: the main one.")
    max_model_len: int = setting(
        0, "Longest prompt + output; 0: what the model allows.", unit="tokens", low=0
    )
    implementation: str = setting(
        "auto",
        "native: this package's own; transformers: the library's, with this package's attention; "
        "auto: native where there is one.",
        choices=("auto", "native", "transformers"),
    )
    dtype: str = setting(
        "auto", "Type of weights and KV.", choices=("auto", "float32", "bfloat16", "float16")
    )
    task: str = setting(
        "auto",
        "generate: tokens; embed: vectors (/v1/embeddings); auto: embed where the directory is "
        "that of an embedding model, or its checkpoint has no head.",
        choices=("auto", "generate", "embed"),
    )
    pooling: str = setting(
        "auto",
        "How a text becomes one vector: its last token, or the mean of all; auto: what the "
        "directory says, else last.",
        choices=("auto", "last", "mean"),
    )
    quantization: str = setting(
        "none",
        "Round the weights when they are read (docs/quantization.md); w8a8: rows of activations "
        "too. Needs the compiled kernels.",
        choices=("none", "int8", "int4", "w8a8"),
    )


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """The service's front: addresses, limits, patience."""

    name: str = setting("", "Unique name of this router; empty: one is made.")
    host: str = setting("127.0.0.1", "Address that the HTTP server listens on.")
    port: int = setting(8010, "Port of the HTTP server; 0: any free one.", low=0, high=65535)
    share_port: bool = setting(
        False,
        "Let other routers of this machine and user listen on the same HTTP port: the kernel "
        "spreads new connections over them.",
    )
    zmq_host: str = setting("127.0.0.1", "Address that the ZeroMQ endpoint listens on.")
    zmq_port: int = setting(
        8011, "Port of the ZeroMQ endpoint; 0: any free one.", low=0, high=65535
    )
    api_key_file: str = setting("", "File with one `name:key` a line, mode 0600; empty: no keys.")
    single_tenant: bool = setting(
        False, "Everybody who asks is one tenant: cached prefixes are shared between API keys."
    )
    bus_endpoint: str = setting("", "Where presence is published; empty: ipc in the run directory.")
    max_inflight: int = setting(4096, "Open requests at most; more are refused.", low=1)
    max_body_bytes: int = setting(4 << 20, "Largest HTTP body.", unit="bytes", low=1024)
    text_cache_bytes: int = setting(
        64 << 20,
        "Encoded texts that are remembered for the next turn of their conversation, and words, a "
        "quarter of it, each model; 0: none.",
        unit="bytes",
        low=0,
    )
    hash_cache_bytes: int = setting(
        16 << 20,
        "Block hashes that are remembered for prompts which begin like an earlier one, each "
        "model; 0: none.",
        unit="bytes",
        low=0,
    )
    max_prompts: int = setting(64, "Prompts in one completion request at most.", low=1)
    max_inputs: int = setting(2048, "Inputs of one embeddings request at most.", low=1)
    max_choices: int = setting(128, "n times prompts of one request at most.", low=1)
    max_logprobs: int = setting(20, "Alternatives a token at most.", low=0, high=1000)
    max_stop_strings: int = setting(16, "Stop strings of a request at most.", low=0)
    max_stop_chars: int = setting(512, "Characters of one stop string at most.", low=1)
    max_logit_bias: int = setting(1024, "Entries of logit_bias at most.", low=0)
    timeout_s: float = setting(600.0, "Longest life of a request.", unit="s", low=1)
    hold_ms: int = setting(
        20,
        "Tokens of an HTTP stream may be held this long to travel together; 0: each as it comes.",
        unit="ms",
        low=0,
        high=1000,
    )
    policy: str = setting(
        "prefix-aware", "How an instance is chosen (docs/routing.md).", choices=POLICIES
    )


@dataclasses.dataclass(frozen=True)
class SchedulerSettings:
    """The master's scheduler."""

    max_num_seqs: int = setting(256, "Running sequences at most.", low=1, high=65536)
    max_num_batched_tokens: int = setting(2048, "Tokens of a step at most.", unit="tokens", low=16)
    strategy: str = setting(
        "chunked", "What goes into a step, and when (docs/scheduling.md).", choices=STRATEGIES
    )
    fairness: str = setting(
        "none", "Who waits in turn: requests, or tenants by the tokens they had.", choices=FAIRNESS
    )
    tenant_weights: str = setting(
        "", "Shares of tenants, as name=share,name=share; others have 1. Needs fairness=tenant."
    )
    preemption: str = setting(
        "auto",
        "Offline requests that give way keep their KV, recompute it, or whichever is cheaper.",
        choices=PREEMPTION,
    )
    max_step_ms: float = setting(
        0.0,
        "Length that steps aim at while tokens stream; 0: 1000 ms where prompts are cut.",
        unit="ms",
        low=0,
        high=600000,
    )
    ttft_ms: int = setting(
        2000,
        "Objective for the first token, where a request has none (slo-urgency).",
        unit="ms",
        low=1,
        high=3600000,
    )
    tpot_ms: int = setting(
        200,
        "Objective for each later token, where a request has none (slo-urgency).",
        unit="ms",
        low=1,
        high=3600000,
    )
    profile_ms: float = setting(
        1000.0,
        "Time at the start for measuring what steps take; 0: it is learnt from requests alone.",
        unit="ms",
        low=0,
        high=60000,
    )
    prefix_cache: bool = setting(True, "Reuse the KV of prompts that begin alike.")
    share_prefixes: bool = setting(
        True, "Let a prompt wait for a beginning that another one is just computing."
    )
    async_scheduling: bool = setting(
        True, "Plan and send the next step while one runs, before its tokens are known."
    )
    max_waiting: int = setting(8192, "Waiting requests at most; more are refused.", low=1)
    drafting: str = setting(
        "none", "Who guesses tokens, several of which a step verifies at once.", choices=DRAFTING
    )
    draft_tokens: int = setting(
        4, "Tokens guessed for a sequence and step at most.", unit="tokens", low=1, high=15
    )


@dataclasses.dataclass(frozen=True)
class MasterSettings:
    """One instance's master."""

    name: str = setting("", "Unique name of this instance; empty: one is made.")
    endpoint: str = setting("", "Where routers connect; empty: ipc in the run directory.")
    bus_endpoint: str = setting(
        "", "Where heartbeats are published; empty: ipc in the run directory."
    )
    advertised_endpoint: str = setting(
        "",
        "What the registry tells routers to connect to, where that is not `endpoint`: an address "
        "in front of this one, behind which a NAT or a proxy passes connections on.",
    )
    advertised_bus_endpoint: str = setting("", "The same for `bus_endpoint`.")
    worker_endpoint: str = setting(
        "",
        "Where workers connect; empty: ipc in the run directory. A worker of another node adds "
        ";key= and the master's public key.",
    )
    num_workers: int = setting(
        1, "Ranks of this instance: each holds a share of every layer.", low=1, high=64
    )
    spawn_workers: bool = setting(
        True, "Start the workers as children; off: they are started on their own."
    )
    worker_start_s: float = setting(
        600.0, "Time that a worker gets to load its model.", unit="s", low=1
    )


HOST_BLOCK_TOKENS = 16
"""Tokens of a block where the settings leave it open and pages are small."""


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """One device's worker."""

    device: str = setting("auto", "Device kind.", choices=("auto", "cpu", "cuda", "npu"))
    engine: str = setting(
        "native",
        "native runs the model; toy draws hashes (for tests and router benchmarks).",
        choices=("native", "toy"),
    )
    block_size: int = setting(
        0,
        "Tokens of a KV block, a power of two; 0: 16, or what suits the pages of a device with "
        "virtual memory.",
        unit="tokens",
        low=0,
        high=256,
    )
    kv_cache_bytes: int = setting(
        0, "Memory for KV; 0: chosen from what is free.", unit="bytes", low=0
    )
    kv_memory: str = setting(
        "xtensor",
        "xtensor maps a sequence's blocks side by side, where the device can; paged reads them "
        "by block tables.",
        choices=("xtensor", "paged"),
    )
    kv_dtype: str = setting(
        "auto",
        "What keys and values are kept as on a CPU: auto, the model's type; int8, rounded, with a "
        "scale for each token and head (docs/quantization.md).",
        choices=("auto", "int8"),
    )
    num_threads: int = setting(
        0,
        "Threads of the engine on a CPU; 0: all cores it may use, or one for a model under 64 MiB.",
        low=0,
        high=1024,
    )
    cpu_affinity: str = setting(
        "none",
        "Cores that the engine's threads on a CPU keep to: none; auto, cores of their own where "
        "num_threads leaves any; or CPUs as 0-3,8, shared out among instances and ranks.",
    )
    kernels: str = setting(
        "auto",
        "Who computes on a CPU: compiled kernels, or torch; auto: compiled where they were built.",
        choices=("auto", "compiled", "torch"),
    )
    graph_max_batch: int = setting(
        256,
        "Decodes of up to this many sequences are launched as one captured graph, on a device that "
        "has graphs; 0: never.",
        low=0,
        high=4096,
    )
    graph_max_rows: int = setting(
        2048,
        "Other steps of up to this many rows are launched as captured graphs between their "
        "attentions; 0: never.",
        unit="tokens",
        low=0,
        high=1 << 16,
    )
    deterministic: bool = setting(False, "Bit-identical logits for a token in any batch.")
    rank: int = setting(0, "Rank of this worker in its instance.", low=0)
    collective_host: str = setting(
        "127.0.0.1",
        "Address of this host at which the other ranks of the instance reach this one; what they "
        "exchange is neither authenticated nor encrypted (docs/parallel.md).",
    )
    collective_timeout_s: float = setting(
        30.0, "Time that the other ranks get for their part of a sum.", unit="s", low=0.1, high=3600
    )
    micro_batch_rows: int = setting(
        0,
        "Several ranks take turns at two halves of a step that has this many rows for each: one "
        "is computed while the other's sums are under way; 0: never.",
        low=0,
    )
    toy_step_ms: float = setting(0.0, "Time of a toy step.", unit="ms", low=0, high=60000)
    toy_token_us: float = setting(
        0.0,
        "Further time of a toy step for each token that it computes.",
        unit="us",
        low=0,
        high=1000000,
    )
    toy_memory: bool = setting(
        True, "The toy engine writes and reads its KV pages; off: a cheaper hash without memory."
    )
    toy_num_blocks: int = setting(4096, "KV blocks of the toy engine.", low=2)

    @property
    def host_block_size(self) -> int:
        """Tokens of a block on a CPU, and of the toy engine's."""
        return self.block_size or HOST_BLOCK_TOKENS


@dataclasses.dataclass(frozen=True)
class KvCacheSettings:
    """A node's KV cache daemon."""

    name: str = setting("", "Unique name of this daemon; empty: one is made.")
    endpoint: str = setting(
        "", "Where masters and workers connect; empty: ipc in the run directory."
    )
    bus_endpoint: str = setting(
        "", "Where heartbeats are published; empty: ipc in the run directory."
    )
    dram_bytes: int = setting(256 << 20, "Size of the DRAM tier.", unit="bytes", low=1 << 20)


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """`xllm serve`: everything on one machine."""

    instances: int = setting(1, "Model instances to start.", low=1, high=64)
    routers: int = setting(
        1,
        "Router processes to start: all listen on the HTTP port, each on a ZeroMQ port of its own "
        "(zmq_port and those behind it).",
        low=1,
        high=64,
    )
    kvcache: bool = setting(True, "Start a KV cache daemon.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a process."""

    cluster: ClusterSettings = ClusterSettings()
    etcd: EtcdSettings = dataclasses.field(default_factory=EtcdSettings)
    model: ModelSettings = ModelSettings()
    router: RouterSettings = RouterSettings()
    admission: AdmissionSettings = dataclasses.field(default_factory=AdmissionSettings)
    routing: RoutingSettings = dataclasses.field(default_factory=RoutingSettings)
    scheduler: SchedulerSettings = SchedulerSettings()
    master: MasterSettings = MasterSettings()
    worker: WorkerSettings = WorkerSettings()
    kvcache: KvCacheSettings = KvCacheSettings()
    kv_index: KvIndexSettings = dataclasses.field(default_factory=KvIndexSettings)
    serve: ServeSettings = ServeSettings()
    chaos: ChaosSettings = dataclasses.field(default_factory=ChaosSettings)
