"""What a policy is asked, and what it answers with.

Pure data. A policy sees instances that may be used and nothing else: who drains, refuses or is
silent is taken out before it is asked, and it is never asked without a candidate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from xllm.router.process_views import InstanceView

Stages = tuple[tuple[str, str], ...]
"""[(role, instance), ...]; at present one of role `both`."""


class CachedTiers(Protocol):
    """Leading blocks of a prompt that one publisher holds, by tier, each counted from the
    prompt's start."""

    @property
    def device(self) -> int:
        """On the device: nothing to do."""
        ...

    @property
    def dram(self) -> int:
        """In the memory of its node."""
        ...

    @property
    def ssd(self) -> int:
        """On its node's disk."""
        ...


class PrefixSource(Protocol):
    """Who knows what is cached where."""

    def match(self, model: str, hashes: bytes) -> Mapping[str, CachedTiers]:
        """Instances that hold leading blocks of a prompt of these 32-byte content hashes."""
        ...

    def placed(self, request_id: str, instance: str, num_blocks: int) -> None:
        """A request goes to an instance that should have so many of its blocks."""
        ...


class RouteQuestion(msgspec.Struct, frozen=True, gc=False):
    """One request as far as its route depends on it."""

    num_prompt_tokens: int
    """All tokens whose KV is needed: the prompt, and what was answered before a move."""
    block_size: int = 16
    cached: Mapping[str, CachedTiers] = {}
    """By instance; who holds nothing is absent."""
    session: str = ""
    """What the client says belongs together; empty: nothing."""
    tenant: str = ""


@dataclasses.dataclass(slots=True)
class RouteFigures:
    """Counts of what policies decided, for the metrics."""

    chosen: dict[str, int] = dataclasses.field(default_factory=dict)
    """Decisions by reason."""
    hit_blocks: int = 0
    """Blocks that were expected to be cached where requests went."""
    prompt_blocks: int = 0
    """Whole blocks of the same prompts."""
    num_yields: int = 0
    """Decisions in which the guard kept a request from where it would have gone."""

    def count(self, reason: str, hit_blocks: int = 0) -> None:
        """One decision."""
        self.chosen[reason] = self.chosen.get(reason, 0) + 1
        self.hit_blocks += hit_blocks


class Policy(Protocol):
    """Chooses a route."""

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """The route of a request; `candidates` is not empty, and one of them is chosen."""
        ...
