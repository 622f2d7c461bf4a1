"""The policy that the settings ask for."""

from __future__ import annotations

from xllm.config.routing import RoutingSettings
from xllm.errors import ConfigError
from xllm.router.policies.guard import ImbalanceGuard
from xllm.router.policies.kv_load import KvLoad
from xllm.router.policies.least_load import LeastLoad
from xllm.router.policies.prefix_aware import CostWeights, PrefixAware
from xllm.router.policies.question import Policy, RouteFigures
from xllm.router.policies.round_robin import RoundRobin
from xllm.router.policies.seeded_random import SeededRandom
from xllm.router.policies.session_affinity import SessionAffinity


def reads_cache(name: str) -> bool:
    """Whether the policy called `name` decides by what is cached where."""
    return name in ("kv-load", "prefix-aware")


def make_policy(name: str, settings: RoutingSettings, figures: RouteFigures) -> Policy:
    """The policy called `name` (router.policy), within that of sessions unless those are off."""
    guard = ImbalanceGuard(settings.guard_requests, settings.guard_ratio)
    inner = _by_name(name, settings, guard, figures)
    return inner if settings.sessions == "none" else SessionAffinity(inner, guard, figures)


def _by_name(
    name: str, settings: RoutingSettings, guard: ImbalanceGuard, figures: RouteFigures
) -> Policy:
    if name == "least-load":
        return LeastLoad(figures)
    if name == "round-robin":
        return RoundRobin(figures)
    if name == "random":
        return SeededRandom(settings.random_seed, figures)
    if name == "kv-load":
        return KvLoad(figures)
    if name == "prefix-aware":
        weights = CostWeights(
            settings.prefill_weight,
            settings.decode_tokens,
            settings.dram_credit,
            settings.ssd_credit,
        )
        return PrefixAware(weights, guard, figures)
    raise ConfigError(f"no policy is named {name}", param="router.policy")
