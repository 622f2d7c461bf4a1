"""The two sinks of HTTP: one gathers whole answers, one keeps what a stream has still to send.

Knows messages and the loop, no sockets and no JSON. Invariant: after the last terminal message
(or the first failure) the waiter is woken and nothing more is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from xllm.protocol.client import RouterMessage
from xllm.protocol.generation import RequestFailed, RequestFinished, TokenDelta

MESSAGE_BYTES = 256
"""What a message waiting to be sent costs beside its text and its tokens."""

TOKEN_BYTES = 8
LOGPROB_BYTES = 256
MERGE_FROM = 64
"""Where this many messages wait for a slow reader, deltas of a choice are merged into one."""


def cost_of(message: RouterMessage) -> int:
    """About how many bytes a message that waits holds."""
    if type(message) is not TokenDelta:
        return MESSAGE_BYTES
    cost = MESSAGE_BYTES + len(message.text) + TOKEN_BYTES * len(message.token_ids)
    return cost + LOGPROB_BYTES * len(message.logprobs) if message.logprobs else cost


def merge_deltas(messages: Sequence[RouterMessage]) -> list[RouterMessage]:
    """The same messages with all deltas of a choice as one; order holds within each choice,
    and what ends a request stays behind its deltas."""
    deltas: dict[tuple[int, int], list[TokenDelta]] = {}
    rest: list[RouterMessage] = []
    for message in messages:
        if type(message) is TokenDelta:
            deltas.setdefault((message.id, message.choice), []).append(message)
        else:
            rest.append(message)
    merged: list[RouterMessage] = []
    for group in deltas.values():
        if len(group) == 1:
            merged.append(group[0])
            continue
        logprobs = [entry for delta in group for entry in delta.logprobs or ()]
        merged.append(
            msgspec.structs.replace(
                group[0],
                token_ids=tuple(token for delta in group for token in delta.token_ids),
                text="".join(delta.text for delta in group),
                logprobs=tuple(logprobs) if logprobs else None,
                finish_reason=group[-1].finish_reason,
            )
        )
    return merged + rest


class WholeAnswer:
    """The sink of requests that are answered in one piece."""

    __slots__ = ("_future", "_missing", "_results", "failure")

    def __init__(self, loop: asyncio.AbstractEventLoop, num_requests: int) -> None:
        self._future: asyncio.Future[None] = loop.create_future()
        self._results: list[RequestFinished | None] = [None] * num_requests
        self._missing = num_requests
        self.failure: RequestFailed | None = None

    def send(self, message: RouterMessage) -> None:
        """Take a message; deltas have nothing that the terminal message lacks."""
        if type(message) is RequestFinished:
            self._results[message.id] = message
            self._missing -= 1
            if self._missing:
                return
        elif type(message) is RequestFailed:
            self.failure = self.failure or message
        else:
            return
        if not self._future.done():
            self._future.set_result(None)

    async def wait_done(self) -> list[RequestFinished]:
        """All results in order, unless `failure` is set."""
        await self._future
        return [result for result in self._results if result is not None]


class StreamedAnswer:
    """The sink of requests whose tokens are sent as they come."""

    __slots__ = (
        "_loop",
        "_max_pending_bytes",
        "_merge_at",
        "_messages",
        "_missing",
        "_on_overflow",
        "_pending_bytes",
        "_waiter",
        "done",
        "merges",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        num_requests: int,
        max_pending_bytes: int,
        on_overflow: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._missing = num_requests
        self._max_pending_bytes = max_pending_bytes
        self._on_overflow = on_overflow
        self._messages: list[RouterMessage] = []
        self._merge_at = MERGE_FROM
        self._pending_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self.merges = True
        """Whether deltas that wait may become one: not while it matters where they end."""
        self.done = False

    def send(self, message: RouterMessage) -> None:
        """Keep a message until it is taken. A reader that is too slow is given up."""
        if self.done:
            return
        self._messages.append(message)
        if type(message) is TokenDelta:
            self._pending_bytes += cost_of(message)
            if self.merges and len(self._messages) >= self._merge_at:
                self._merge()
            if self._pending_bytes > self._max_pending_bytes:
                self._give_up()
        elif type(message) is RequestFinished:
            self._missing -= 1
            self.done = self._missing == 0
        else:
            self.done = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[RouterMessage]:
        """All messages that wait, at least one."""
        if not self._messages and not self.done:
            self._waiter = self._loop.create_future()
            await self._waiter
            self._waiter = None
        messages, self._messages = self._messages, []
        self._pending_bytes = 0
        self._merge_at = MERGE_FROM
        return messages

    def _merge(self) -> None:
        self._messages = merge_deltas(self._messages)
        self._merge_at = MERGE_FROM + len(self._messages)
        self._pending_bytes = sum(map(cost_of, self._messages))

    def _give_up(self) -> None:
        self._messages.clear()
        self.done = True
        self._on_overflow()
