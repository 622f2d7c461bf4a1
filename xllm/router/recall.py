"""Tokens that instances still have of a request whose router is gone.

An instance runs the requests of a lost router on for a second. Whoever asks for the rest of such an
answer meanwhile need not have its beginning drawn again: every instance is asked for it. What
comes back is a claim, and `proven` says what of it is taken. No answer in time is none: an
instance of an older version knows no such question, and one that is frozen is not waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from xllm.protocol.instance import HeldTokens, InstanceRequest, QueryTokens
from xllm.router.metrics import RouterMetrics
from xllm.router.view import ClusterView

RECALL_S = 0.2
Outputs = Sequence[Sequence[int]]
"""Token ids by choice; empty where a choice has none."""


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

    async def recall(self, request_id: str, proven: Callable[[Outputs], Outputs]) -> Outputs:
        """What is proven of the first answer of which anything is; empty: nothing is, in time."""
        loop = asyncio.get_running_loop()
        asked: dict[tuple[str, int], asyncio.Future[Outputs]] = {}
        for one in self._view:
            if not one.connected or one.suspect:
                continue
            self._number += 1
            if self._send(one.name, QueryTokens(self._number, request_id)):
                asked[one.name, self._number] = loop.create_future()
        self._waiting |= asked
        try:
            for answer in asyncio.as_completed(asked.values(), timeout=RECALL_S):
                found = proven(await answer)
                if any(found):
                    self._metrics.num_recalled += 1
                    return found
        except TimeoutError:
            pass  # whoever is silent has nothing
        finally:
            for question in asked:
                self._waiting.pop(question).cancel()
        return ()

    def answered(self, name: str, word: HeldTokens) -> None:
        """An instance says what it has. What it was not asked is ignored."""
        future = self._waiting.get((name, word.number))
        if future is not None and not future.done():
            future.set_result(word.outputs)
