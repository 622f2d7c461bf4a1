"""Tokens that instances still have of a request whose router is gone.

An instance runs the requests of a lost router on for a second. Whoever asks for the rest of such an
answer meanwhile need not have its beginning drawn again: every instance of its model is asked for
it. What comes back is a claim, and `proven` says what of it is taken. No answer in time is none: an
instance of an older version knows no such question, and one that is frozen is not waited for.
Invariant: MAX_AT_ONCE such questions are open at most; who waits for its turn waits no longer than
for an answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

from xllm.protocol.instance import HeldTokens, InstanceRequest, QueryTokens
from xllm.router.metrics import RouterMetrics
from xllm.router.view import ClusterView

RECALL_S = 0.2
"""How long the beginning of an answer is waited for, one's turn included."""
MAX_AT_ONCE = 64
Outputs = Sequence[Sequence[int]]
"""Token ids by choice; empty where a choice has none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recall:
    """What to ask for: the tokens of `request_id`, of which those are taken that are `proven`."""

    request_id: str
    proven: Callable[[Outputs], Outputs]


class Recaller:
    """`send(instance, message)`: whether it was sent; must not raise."""

    def __init__(
        self,
        view: ClusterView,
        send: Callable[[str, InstanceRequest], bool],
        metrics: RouterMetrics,
    ) -> None:
        self._view = view
        self._send = send
        self._metrics = metrics
        self._number = 0
        self._waiting: dict[tuple[str, int], asyncio.Future[Outputs]] = {}
        """By who was asked, and the number of the question."""
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def recall(self, model: str, recall: Recall) -> Outputs:
        """What is proven of the first answer of which anything is; empty: nothing is, in time."""
        try:
            async with asyncio.timeout(RECALL_S), self._turns:
                return await self._ask(model, recall)
        except TimeoutError:
            return ()  # whoever is silent has nothing

    async def _ask(self, model: str, recall: Recall) -> Outputs:
        loop = asyncio.get_running_loop()
        asked: dict[tuple[str, int], asyncio.Future[Outputs]] = {}
        for one in self._view:
            if one.record.model != model or not one.connected or one.suspect:
                continue
            self._number += 1
            if self._send(one.name, QueryTokens(self._number, recall.request_id)):
                asked[one.name, self._number] = loop.create_future()
        self._waiting |= asked
        try:
            for answer in asyncio.as_completed(asked.values()):
                found = recall.proven(await answer)
                if any(found):
                    self._metrics.num_recalled += 1
                    return found
        finally:
            for question in asked:
                self._waiting.pop(question).cancel()
        return ()

    def answered(self, name: str, word: HeldTokens) -> None:
        """An instance says what it has. What it was not asked is ignored."""
        future = self._waiting.get((name, word.number))
        if future is not None and not future.done():
            future.set_result(word.outputs)
