"""What a step, a deadline or an admission gave the routers: collected, then handed over."""

from __future__ import annotations

import msgspec

from xllm.protocol.instance import PooledVector, PrefillDone, PromptScores, RequestEnded, TokenItem


class StepOutcome:
    """Tokens first, then ends and prefills: the order in which a router must see them."""

    __slots__ = ("ended", "items", "prefilled", "prompt_scores", "vectors")

    def __init__(self) -> None:
        self.items: list[TokenItem] = []
        self.ended: list[RequestEnded] = []
        self.prompt_scores: list[PromptScores] = []
        self.prefilled: list[PrefillDone] = []
        self.vectors: list[PooledVector] = []

    def extend(self, other: StepOutcome) -> None:
        """Take in what came after it."""
        self.items += other.items
        self.ended += other.ended
        self.prompt_scores += other.prompt_scores
        self.prefilled += other.prefilled
        self.vectors += other.vectors

    def mark(self, code: str, *, blameless: bool = False, shared: bool = False) -> None:
        """Say of all that ended with this code how it was with their steps: see RequestEnded."""
        if blameless or shared:
            self.ended = [
                msgspec.structs.replace(one, blameless=blameless, shared=shared)
                if one.code == code
                else one
                for one in self.ended
            ]

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(
            self.items or self.ended or self.prompt_scores or self.prefilled or self.vectors
        )
