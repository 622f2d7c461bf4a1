"""Proving the data path: one question to each usable instance, through its worker and back.

Questions that overlap share one probe, so that a hundred health checks a second cost one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from xllm.protocol.instance import ProbeAnswer, ProbeInstance

PROBE_TIMEOUT_S = 1.0


class Prober:
    """Asks instances for a sign of life. `send(instance, message)` must not raise."""

    def __init__(self, send: Callable[[str, ProbeInstance], None]) -> None:
        self._send = send
        self._nonce = 0
        self._waiting: dict[tuple[str, int], asyncio.Future[bool]] = {}
        """By who was asked, and the number of the question."""
        self._running: asyncio.Task[bool] | None = None

    async def probe(self, instances: Sequence[str]) -> bool:
        """Whether at least one of them answered well within a second."""
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._ask(instances))
        return await asyncio.shield(self._running)

    def answered(self, name: str, word: ProbeAnswer) -> None:
        """An instance answers. What it was not asked is ignored."""
        future = self._waiting.get((name, word.nonce))
        if future is not None and not future.done():
            future.set_result(word.ok)

    def close(self) -> None:
        """End a probe that runs."""
        if self._running is not None:
            self._running.cancel()

    async def _ask(self, instances: Sequence[str]) -> bool:
        loop = asyncio.get_running_loop()
        futures = []
        asked = []
        try:
            for name in instances:
                self._nonce += 1
                future: asyncio.Future[bool] = loop.create_future()
                self._waiting[name, self._nonce] = future
                asked.append((name, self._nonce))
                futures.append(future)
                self._send(name, ProbeInstance(self._nonce))
            for answer in asyncio.as_completed(futures, timeout=PROBE_TIMEOUT_S):
                if await answer:
                    return True
        except TimeoutError:
            pass  # silence within the time is the answer
        finally:
            for question in asked:
                self._waiting.pop(question).cancel()
        return False
