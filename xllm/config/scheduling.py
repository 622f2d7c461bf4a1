"""The scheduler's settings, and which go together: the table of docs/scheduling.md as data."""

from __future__ import annotations

import dataclasses
import math

from xllm.config.field import setting
from xllm.errors import ConfigError

FAIRNESS = ("none", "tenant")
PREEMPTION = ("auto", "recompute", "pause")
DRAFTING = ("none", "prompt-lookup")
MIN_TENANT_WEIGHT, MAX_TENANT_WEIGHT = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class StrategyRow:
    """What a strategy can be had with. `cuts_prompts`: max_step_ms has something to cut."""

    fairness: tuple[str, ...] = FAIRNESS
    preemption: tuple[str, ...] = PREEMPTION
    cuts_prompts: bool = True


COMBINATIONS = {
    "chunked": StrategyRow(),
    "continuous": StrategyRow(cuts_prompts=False),
    "prefill-first": StrategyRow(),
    "decode-first": StrategyRow(),
    "zero-evict": StrategyRow(preemption=("auto",)),
    "slo-urgency": StrategyRow(fairness=("none",)),
}
STRATEGIES = tuple(COMBINATIONS)


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


def check_scheduling(settings: SchedulerSettings) -> None:
    """ConfigError naming both settings of a combination that is not in the table."""
    row = COMBINATIONS[settings.strategy]
    for name, allowed in (("fairness", row.fairness), ("preemption", row.preemption)):
        value = getattr(settings, name)
        if value not in allowed:
            raise _conflict(name, value, settings)
    if settings.max_step_ms and not row.cuts_prompts:
        raise _conflict("max_step_ms", settings.max_step_ms, settings)
    if settings.tenant_weights and settings.fairness != "tenant":
        raise ConfigError(
            "scheduler.tenant_weights needs scheduler.fairness=tenant, "
            f"not scheduler.fairness={settings.fairness}",
            param="scheduler.tenant_weights",
        )
    tenant_weights(settings.tenant_weights)


def tenant_weights(text: str) -> dict[str, float]:
    """`name=share,name=share` as a mapping; ConfigError for anything else."""
    weights: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, sign, value = part.strip().rpartition("=")
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        is_share = MIN_TENANT_WEIGHT <= share <= MAX_TENANT_WEIGHT
        if not sign or not name or name in weights or not is_share:
            raise ConfigError(
                f"scheduler.tenant_weights: {part!r} is not a new name=share with a share of at "
                f"least {MIN_TENANT_WEIGHT:.6f} and at most {MAX_TENANT_WEIGHT:.0f}",
                param="scheduler.tenant_weights",
            )
        weights[name] = share
    return weights


def max_rows_each(settings: SchedulerSettings) -> int:
    """Rows of a sequence that generates, in one step, at most."""
    return 1 + (settings.draft_tokens if settings.drafting != "none" else 0)


def max_drawn_rows(settings: SchedulerSettings) -> int:
    """Rows that tokens are drawn from in a step of as many sequences as may be."""
    return settings.max_num_seqs * max_rows_each(settings)


def _conflict(name: str, value: object, settings: SchedulerSettings) -> ConfigError:
    return ConfigError(
        f"scheduler.{name}={value} does not go with scheduler.strategy={settings.strategy}",
        param=f"scheduler.{name}",
    )
