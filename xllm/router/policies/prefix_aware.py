"""Where the request costs least: the prompt that is not cached, and the work before it, in tokens.

    cost = prefill_weight * (prompt tokens - credit) + queued tokens
           + decode_tokens * running requests + block size * blocks short

- prefill_weight: above 1, since what is computed again costs more than this request's own time:
  it holds up whoever comes behind, and its blocks push out others;
- credit: block size * (device blocks + dram_credit * further blocks in DRAM + ssd_credit *
  further blocks on disk); one token at least is always computed;
- queued tokens: prompt tokens there that nobody has computed yet, with those that this router
  sent since the last heartbeat;
- running requests: all that the instance has, each taken as so many tokens of its steps;
- blocks short: what the prompt needs beyond the blocks that are free, as others must end first.

Every candidate is compared, with a cached block or without: a prompt that is cached nowhere goes
by load, and a cached one to an idle instance where the queue before its blocks is the dearer
part. The guard comes first: who is over its bound is no candidate.

After the router cost of NVIDIA Dynamo (prefill minus overlap, plus decode load).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xllm.router.policies.guard import ImbalanceGuard
from xllm.router.policies.last_chosen import LastChosen
from xllm.router.policies.load import loads_of
from xllm.router.policies.question import CachedTiers, RouteFigures, RouteQuestion, Stages
from xllm.router.process_views import InstanceView


@dataclasses.dataclass(frozen=True, slots=True)
class CostWeights:
    """What a thing is worth, in prompt tokens (see above). Credits: 0 to 1 of a device block."""

    prefill_weight: float = 2.0
    decode_tokens: float = 16.0
    dram_credit: float = 0.75
    ssd_credit: float = 0.5


class PrefixAware:
    """The least cost; of equals the least lately chosen."""

    def __init__(self, weights: CostWeights, guard: ImbalanceGuard, figures: RouteFigures) -> None:
        self._weights = weights
        self._guard = guard
        self._figures = figures
        self._chosen = LastChosen()

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """The cheapest within the guard's bound."""
        best = candidates[0] if len(candidates) == 1 else self._cheapest(candidates, ask)
        held = ask.cached.get(best.name)
        if held is None:
            self._figures.count("elsewhere" if ask.cached else "load")
        else:
            self._figures.count("prefix", max(held.device, held.dram, held.ssd))
        return self._chosen.take(best.name)

    def _cheapest(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> InstanceView:
        loads, costs = self.costs(candidates, ask)
        limit = self._guard.limit(loads) if ask.cached else max(loads)
        least = min(costs)
        lowest = least
        if limit < max(loads):
            allowed = [cost for cost, load in zip(costs, loads, strict=True) if load <= limit]
            lowest = min(allowed, default=least)
        self._figures.num_yields += lowest > least
        if costs.count(lowest) == 1:
            return candidates[costs.index(lowest)]
        found = [
            one
            for one, cost, load in zip(candidates, costs, loads, strict=True)
            if cost == lowest and load <= limit
        ]
        return found[0] if len(found) == 1 else min(found, key=self._last_chosen)

    def _last_chosen(self, one: InstanceView) -> int:
        return self._chosen[one.name]

    def costs(
        self, candidates: Sequence[InstanceView], ask: RouteQuestion
    ) -> tuple[list[int], list[float]]:
        """Requests at each candidate, and what this one would cost there, in tokens."""
        weights, cached = self._weights, ask.cached
        size, num_tokens = ask.block_size, ask.num_prompt_tokens
        num_blocks = -(-num_tokens // size)
        uncached = weights.prefill_weight * num_tokens
        decode_tokens = weights.decode_tokens
        loads, costs = [], []
        for one, (num_there, queued, free) in zip(
            candidates, loads_of(candidates, size), strict=True
        ):
            cost, short = uncached, num_blocks - free
            held = cached.get(one.name) if cached else None
            if held is not None:
                device = held.device
                blocks: float = device
                if held.dram > device or held.ssd > device:
                    blocks = credited_blocks(held, weights)
                left = num_tokens - size * blocks
                cost = weights.prefill_weight * (left if left > 1.0 else 1.0)
                short -= device
            cost += queued + decode_tokens * num_there
            loads.append(num_there)
            costs.append(cost + size * short if short > 0 else cost)
        return loads, costs


def credited_blocks(held: CachedTiers, weights: CostWeights) -> float:
    """Blocks that need no computing, those of slower tiers at what they are worth: each tier
    counts for what reaches beyond the faster ones."""
    device = held.device
    dram = max(device, held.dram)
    ssd = max(dram, held.ssd)
    return device + weights.dram_credit * (dram - device) + weights.ssd_credit * (ssd - dram)
