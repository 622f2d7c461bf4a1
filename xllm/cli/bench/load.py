"""Sends a load's requests at their times and notes what came back.

Open loop: a request is due at its time whatever became of those before it; with `concurrency` it
also waits for a place. Which protocol is spoken is the target's business.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from xllm.cli.bench.measures import RequestRecord
from xllm.cli.bench.shapes import RequestShape


class LoadError(Exception):
    """A request failed: `kind: what happened`, counted by kind."""


class Piece:
    """A word from the server. `num_tokens`: tokens that it carried, where the server says so;
    `has_tokens`: whether it carried any; `usage`: (prompt, output) tokens of the whole answer."""

    __slots__ = ("has_tokens", "num_tokens", "usage")

    def __init__(
        self, has_tokens: bool, num_tokens: int = 0, usage: tuple[int, int] | None = None
    ) -> None:
        self.has_tokens = has_tokens
        self.num_tokens = num_tokens
        self.usage = usage


class Target(Protocol):
    """What is loaded."""

    def prepare(self, index: int, shape: RequestShape) -> object:
        """The request in the target's own form; made before its time."""

    def send(self, prepared: object) -> AsyncGenerator[Piece, None]:
        """Send it and give what comes; LoadError where that fails."""

    async def close(self) -> None:
        """Close connections."""


async def run_load(
    target: Target,
    shapes: Sequence[RequestShape],
    times: Sequence[float],
    concurrency: int | None,
    timeout_s: float,
    ended: Callable[[RequestRecord], None],
) -> list[RequestRecord]:
    """Send all of them; returns when the last one ended. `ended` is told of each; a request that
    takes longer than `timeout_s` has failed."""
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
    start = loop.time()

    async def one(record: RequestRecord, prepared: object) -> None:
        async with places:
            record.sent_s = loop.time() - start
            await _follow(target, prepared, record, lambda: loop.time() - start, timeout_s)
        ended(record)

    records = []
    async with asyncio.TaskGroup() as group:
        for index, (shape, due_s) in enumerate(zip(shapes, times, strict=True)):
            prepared = target.prepare(index, shape)
            wait_s = due_s - (loop.time() - start)
            # Even a request that is due goes on only after what came in meanwhile was read.
            await asyncio.sleep(max(wait_s, 0))
            record = RequestRecord(index, due_s)
            records.append(record)
            group.create_task(one(record, prepared))
    return records


async def _follow(
    target: Target,
    prepared: object,
    record: RequestRecord,
    clock: Callable[[], float],
    timeout_s: float,
) -> None:
    counted = 0
    usage: tuple[int, int] | None = None
    try:
        async with asyncio.timeout(timeout_s), contextlib.aclosing(target.send(prepared)) as pieces:
            async for piece in pieces:
                now = clock()
                if piece.usage is not None:
                    usage = piece.usage
                    continue
                record.ended_s = now
                if piece.has_tokens:
                    record.token_s.append(now)
                    counted += piece.num_tokens or 1
    except LoadError as error:
        record.error = str(error)
    except TimeoutError:
        record.error = f"timeout: no end within {timeout_s:g} s"
    if record.error or not record.ended_s:
        record.ended_s = clock()
    record.num_prompt, record.num_output = usage or (0, counted)
    if not record.error and not record.num_output:
        record.error = "empty answer: no token came"
