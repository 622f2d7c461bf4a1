"""How far a request was when instances died under it: whether it has passed that place since.

What gets further than it was is not the reason of those deaths, alone or not: all that was under
way then has been computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from xllm.protocol.instance import PASSED_TOKENS
from xllm.router.state.choice import ChoiceState


class DeathMarks(msgspec.Struct, eq=False, gc=False):
    """Where each choice was at the last of these deaths; before the first, nowhere."""

    _num_tokens: tuple[int, ...] = ()

    def set_at(self, choices: Sequence[ChoiceState]) -> None:
        """An instance died: this is how far they are."""
        self._num_tokens = tuple([len(choice.ids) for choice in choices])

    def are_passed_by(self, choices: Sequence[ChoiceState]) -> bool:
        """Whether each of them has ended, or has PASSED_TOKENS beyond its mark. Asked only after
        `set_at`."""
        return all(
            choice.finish_reason or len(choice.ids) >= mark + PASSED_TOKENS
            for choice, mark in zip(choices, self._num_tokens, strict=True)
        )
