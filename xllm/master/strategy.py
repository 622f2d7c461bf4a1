"""How a step's token budget is shared: small decisions that can stand in for each other.

A strategy sees numbers only. Running decodes come first in every strategy here; it is asked for
each prefill in turn, running ones first.
"""

from __future__ import annotations

from typing import Protocol


class PrefillStrategy(Protocol):
    """Decides the size of one prefill's share of a step."""

    def share(self, remaining: int, budget_left: int, num_prefills: int) -> int:
        """Tokens of this step for a prefill with `remaining` tokens to compute; 0: not in this
        step, and none after it. `num_prefills`: how many have a share in it already."""
        ...


class ChunkedPrefill:
    """Fill what is left of the budget; a long prompt is computed over several steps."""

    def share(self, remaining: int, budget_left: int, num_prefills: int) -> int:
        """As much as fits."""
        return min(remaining, budget_left)


class WholePrefill:
    """Compute a prompt in one step. One longer than the budget is the step's only prefill."""

    def share(self, remaining: int, budget_left: int, num_prefills: int) -> int:
        """All or nothing."""
        return remaining if remaining <= budget_left or num_prefills == 0 else 0


def choose_strategy(chunked_prefill: bool) -> PrefillStrategy:
    """The strategy that a setting stands for."""
    return ChunkedPrefill() if chunked_prefill else WholePrefill()
