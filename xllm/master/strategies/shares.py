"""How much of a prompt a step computes: as much as there is room for, or all of it."""

from __future__ import annotations

from typing import Protocol


class PrefillShare(Protocol):
    """Decides the size of one prefill's share of a step."""

    def share(self, remaining: int, allowed: int, num_prefills: int) -> int:
        """Tokens of this step for a prefill with `remaining` tokens to compute, of which the
        step has room for `allowed`; 0: not in this step, and none after it. `num_prefills`: how
        many have a share in it already."""
        ...


class ChunkedPrefill:
    """Fill what is left of the budget; a long prompt is computed over several steps."""

    def share(self, remaining: int, allowed: int, num_prefills: int) -> int:
        """As much as fits."""
        return allowed


class WholePrefill:
    """Compute a prompt in one step. One longer than the budget is the step's only prefill."""

    def share(self, remaining: int, allowed: int, num_prefills: int) -> int:
        """All or nothing."""
        return remaining if remaining <= allowed or num_prefills == 0 else 0
