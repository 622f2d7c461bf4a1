"""A device's worker: engine, KV memory, threads, graphs, ranks, and the toy engine."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting

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
