"""Which scheduling settings go together: the table of docs/scheduling.md as data."""

from __future__ import annotations

import dataclasses
import math
import typing

from xllm.errors import ConfigError

if typing.TYPE_CHECKING:
    from xllm.config.settings import SchedulerSettings

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
