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
from xllm.router.policies.load import free_blocks, num_requests, queued_tokens
from xllm.router.policies.question import CachedTiers, RouteFigures, RouteQuestion, Stages
from xllm.router.view import InstanceView


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
        loads = [num_requests(one) for one in candidates]
        costs = [self.cost(one, ask, load) for one, load in zip(candidates, loads, strict=True)]
        limit = self._guard.limit(loads) if ask.cached else max(loads)
        least = min(costs)
        lowest = min(
            [cost for cost, load in zip(costs, loads, strict=True) if load <= limit], default=least
        )
        self._figures.num_yields += lowest > least
        found = [
            one
            for one, cost, load in zip(candidates, costs, loads, strict=True)
            if cost == lowest and load <= limit
        ]
        return found[0] if len(found) == 1 else min(found, key=self._last_chosen)

    def _last_chosen(self, one: InstanceView) -> int:
        return self._chosen[one.name]

    def cost(self, one: InstanceView, ask: RouteQuestion, num_there: int) -> float:
        """What the request would cost there, in tokens. `num_there`: requests there."""
        weights = self._weights
        size, num_tokens = ask.block_size, ask.num_prompt_tokens
        held = ask.cached.get(one.name)
        num_new = -(-num_tokens // size)
        to_compute: float = num_tokens
        if held is not None:
            to_compute = max(1.0, num_tokens - size * credited_blocks(held, weights))
            num_new -= held.device
        short = num_new - free_blocks(one, size)
        cost = (
            weights.prefill_weight * to_compute
            + queued_tokens(one)
            + weights.decode_tokens * num_there
        )
        return cost + size * short if short > 0 else cost


def credited_blocks(held: CachedTiers, weights: CostWeights) -> float:
    """Blocks that need no computing, those of slower tiers at what they are worth: each tier
    counts for what reaches beyond the faster ones."""
    device = held.device
    dram = max(device, held.dram)
    ssd = max(dram, held.ssd)
    return device + weights.dram_credit * (dram - device) + weights.ssd_credit * (ssd - dram)
