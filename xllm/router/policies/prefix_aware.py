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
        self._turns = LastChosen()

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """The cheapest within the guard's bound."""
        cached = ask.cached
        best = candidates[0]
        if len(candidates) > 1:
            allowed = self._guard.within(candidates) if cached else candidates
            best = min(allowed, key=lambda one: (self.cost(one, ask), self._turns[one.name]))
            if len(allowed) < len(candidates):
                wanted = min(candidates, key=lambda one: self.cost(one, ask))
                self._figures.num_yields += wanted not in allowed
        held = cached.get(best.name)
        if held is None:
            self._figures.count("elsewhere" if cached else "load")
        else:
            self._figures.count("prefix", max(held.device, held.dram, held.ssd))
        return self._turns.take(best.name)

    def cost(self, one: InstanceView, ask: RouteQuestion) -> float:
        """What the request would cost there, in tokens."""
        weights = self._weights
        size, num_tokens = ask.block_size, ask.num_prompt_tokens
        held = ask.cached.get(one.name)
        credit = 0.0
        num_new = -(-num_tokens // size)
        if held is not None:
            credit = size * credited_blocks(held, weights)
            num_new -= held.device
        short = num_new - free_blocks(one, size)
        return (
            weights.prefill_weight * max(1.0, num_tokens - credit)
            + queued_tokens(one)
            + weights.decode_tokens * num_requests(one)
            + size * max(0, short)
        )


def credited_blocks(held: CachedTiers, weights: CostWeights) -> float:
    """Blocks that need no computing, those of slower tiers at what they are worth: each tier
    counts for what reaches beyond the faster ones."""
    device = held.device
    dram = max(device, held.dram)
    ssd = max(dram, held.ssd)
    return device + weights.dram_credit * (dram - device) + weights.ssd_credit * (ssd - dram)
