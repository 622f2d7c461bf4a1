"""Who is let in, how long requests wait, and when an instance is left alone (docs/routing.md)."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting

MAX_PER_MINUTE = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class AdmissionSettings:
    """Limits of a tenant are the cluster's: all its routers must be given the same."""

    tenant_limits_file: str = setting(
        "", "TOML file with the limits of tenants by name (docs/routing.md); empty: none."
    )
    requests_per_minute: int = setting(
        0, "Requests of a tenant a minute; 0: no limit.", low=0, high=MAX_PER_MINUTE
    )
    tokens_per_minute: int = setting(
        0, "Prompt and new tokens of a tenant a minute; 0: no limit.", low=0, high=MAX_PER_MINUTE
    )
    concurrency: int = setting(
        0, "Open requests of a tenant; 0: no limit.", low=0, high=MAX_PER_MINUTE
    )
    instance_waiting: int = setting(
        64,
        "An instance gets no more while so many requests wait there (half of it: no more offline "
        "ones); further ones wait in the router. 0: all are sent at once.",
        low=0,
        high=1_000_000,
    )
    queue_size: int = setting(
        4096, "Requests of a model that wait in the router at most; 0: none.", low=0, high=1_000_000
    )
    queue_timeout_s: float = setting(
        300.0,
        "Time that an online request waits in the router at most; a shorter ttft_ms of its own "
        "holds.",
        unit="s",
        low=0.01,
        high=86400,
    )
    expected_instance_s: float = setting(
        3.0,
        "Time that requests wait for an instance that the registry lists and that this router has "
        "not heard from yet, as when it has just started, where no other is ready; 0: they are "
        "refused at once.",
        unit="s",
        low=0,
        high=3600,
    )
    breaker_failures: int = setting(
        5, "Failures of an instance that open its circuit breaker; 0: never.", low=0, high=1000
    )
    breaker_window_s: float = setting(
        30.0, "Time within which they must fall.", unit="s", low=0.1, high=3600
    )
    breaker_open_s: float = setting(
        5.0,
        "Time that an open breaker keeps requests away before one is tried; doubled each time "
        "that the trial fails, at most eight times as long.",
        unit="s",
        low=0.1,
        high=3600,
    )
