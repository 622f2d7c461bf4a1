"""What a step, a deadline or an admission gave the routers: collected, then handed over."""

from __future__ import annotations

from xllm.protocol.instance import PrefillDone, PromptScores, RequestEnded, TokenItem


class StepOutcome:
    """Tokens first, then ends and prefills: the order in which a router must see them."""

    __slots__ = ("ended", "items", "prefilled", "prompt_scores")

    def __init__(self) -> None:
        self.items: list[TokenItem] = []
        self.ended: list[RequestEnded] = []
        self.prompt_scores: list[PromptScores] = []
        self.prefilled: list[PrefillDone] = []

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.items or self.ended or self.prompt_scores or self.prefilled)
