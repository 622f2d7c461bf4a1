"""What becomes of the pages of a sequence that gives way: kept, or computed again later.

Kept pages cost what somebody else has to compute again for want of them; pages given up cost
their own recomputation. Numbers only.
"""

from __future__ import annotations

import dataclasses

from xllm.master.strategies.step_model import StepTimeModel

NOMINAL_TOKEN_S = 1e-4
"""What a token costs to compute as long as nothing is known of it: only ratios matter then."""


@dataclasses.dataclass(frozen=True, slots=True)
class GivingWay:
    """A sequence that could stop running. `num_tokens` are computed, in `num_blocks` blocks that
    nobody shares. `num_short`: blocks that the others, grown to their ends, would lack if these
    are kept; those have `mean_tokens` tokens each."""

    num_tokens: int
    num_blocks: int
    num_short: int
    mean_tokens: int


def keeps_pages(one: GivingWay, model: StepTimeModel, block_size: int) -> bool:
    """Whether keeping is cheaper. Ties keep: what is kept can be given up later still."""
    num_missed = min(max(one.num_short, 0), one.num_blocks)
    if not num_missed:
        return True
    # A block is missed by whoever runs then: it gives up whole tables of the mean length.
    per_block = _recompute_s(one.mean_tokens, model) / max(1, -(-one.mean_tokens // block_size))
    return num_missed * per_block <= _recompute_s(one.num_tokens, model)


def _recompute_s(num_tokens: int, model: StepTimeModel) -> float:
    known = model.prefill_s(0, num_tokens)
    return num_tokens * NOMINAL_TOKEN_S if known is None else known
