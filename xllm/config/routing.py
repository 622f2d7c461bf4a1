"""How routers choose instances: the figures of the policies (docs/routing.md)."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting

POLICIES = ("least-load", "prefix-aware", "kv-load", "round-robin", "random")


@dataclasses.dataclass(frozen=True)
class RoutingSettings:
    """The policies' figures; `router.policy` says which one decides."""

    sessions: str = setting(
        "named",
        "Which requests stay with the instance of their session: none; named, those with an "
        "x-session-id header, metadata.session_id or a session of the ZeroMQ protocol; user, also "
        "those with a `user` field.",
        choices=("none", "named", "user"),
    )
    guard_requests: int = setting(
        16,
        "Affinity to a cached prefix or a session yields where an instance has so many requests "
        "more than the least busy one, and is beyond guard_ratio, too.",
        low=0,
        high=1_000_000,
    )
    guard_ratio: float = setting(
        1.5, "The same as a multiple of the mean of all instances.", low=1, high=1000
    )
    prefill_weight: float = setting(
        2.0,
        "prefix-aware: weight of a prompt token that is not cached against one that is queued.",
        low=0,
        high=1000,
    )
    decode_tokens: float = setting(
        16.0,
        "prefix-aware: what a request that is there already costs a new one, in prompt tokens.",
        unit="tokens",
        low=0,
        high=1_000_000,
    )
    dram_credit: float = setting(
        0.75, "prefix-aware: worth of a block in DRAM, of one on the device.", low=0, high=1
    )
    ssd_credit: float = setting(
        0.5, "prefix-aware: worth of a block on disk, of one on the device.", low=0, high=1
    )
    random_seed: int = setting(0, "random: where its draws begin.", low=0, high=(1 << 63) - 1)
