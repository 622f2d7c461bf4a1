"""Listeners that turn callbacks into something to await or to iterate."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from xllm.client.open_request import EndMessage
from xllm.client.results import AnswerBuilder, Completion, StreamDelta
from xllm.errors import XllmError
from xllm.protocol.generation import RequestFinished, TokenDelta

StreamItem = StreamDelta | XllmError | None
"""A delta, the error that ended a stream, or None for its good end."""


class AnswerWaiter:
    """Waits for the one message that ends a request or question."""

    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[EndMessage] = loop.create_future()

    def on_delta(self, delta: TokenDelta) -> None:
        """Not asked for: the terminal message holds everything."""

    def on_end(self, message: EndMessage) -> None:
        """Wakes who waits."""
        if not self._future.done():
            self._future.set_result(message)

    def on_error(self, error: XllmError) -> None:
        """Raises where it is awaited."""
        if not self._future.done():
            self._future.set_exception(error)

    async def wait_end(self) -> EndMessage:
        """The terminal message; raises what ended the request instead."""
        return await self._future


class StreamBuffer:
    """Deltas between the connection and one reader: on the same loop, or behind `forward`.

    Unbounded on purpose: it holds at most what this client asked for itself."""

    __slots__ = ("_builder", "_deltas", "_error", "_loop", "_put", "_reader", "completion")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._builder = AnswerBuilder(time.monotonic())
        self._deltas: deque[StreamDelta] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._error: XllmError | None = None
        self._put: Callable[[StreamItem], None] | None = None
        self.completion: Completion | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.completion is not None or self._error is not None

    def on_delta(self, delta: TokenDelta) -> None:
        """Keeps it for the reader."""
        item = self._builder.add(delta, time.monotonic())
        if self._put is not None:
            self._put(item)
            return
        self._deltas.append(item)
        self._wake()

    def on_end(self, message: EndMessage) -> None:
        """The stream is complete."""
        assert isinstance(message, RequestFinished)
        self.completion = self._builder.finish(message, time.monotonic())
        self._finish()

    def on_error(self, error: XllmError) -> None:
        """Raises after the deltas that came before."""
        self._error = error
        self._finish()

    async def read(self) -> StreamDelta | None:
        """The next delta, None at the end; raises what ended the stream instead."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self.completion is not None:
                return None
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._deltas.popleft()

    def forward(self, put: Callable[[StreamItem], None]) -> None:
        """From now on hand everything to `put` at once: the way to another thread."""
        self._put = put
        while self._deltas:
            put(self._deltas.popleft())
        if self.ended:
            put(self._error)

    def _finish(self) -> None:
        if self._put is not None:
            self._put(self._error)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
