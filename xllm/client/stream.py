"""A streamed answer of the asynchronous client: iterate over it, stop it, have it whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from xllm.client.answers import StreamBuffer, StreamItem
from xllm.client.connection import ClientConnection
from xllm.client.results import Completion, StreamDelta
from xllm.errors import ClosedError


class TokenStream:
    """One streamed answer. `async for` gives its StreamDeltas, once; `completion` is there after
    the last. `async with` (or `aclose`) stops it for sure, whatever becomes of the loop."""

    def __init__(self, connection: ClientConnection, request_id: int, buffer: StreamBuffer) -> None:
        self._connection = connection
        self._request_id = request_id
        self._buffer = buffer

    @property
    def completion(self) -> Completion | None:
        """The whole answer with usage and timing, once it ended well; None before."""
        return self._buffer.completion

    def __aiter__(self) -> AsyncIterator[StreamDelta]:
        return StreamCursor(self)

    async def read(self) -> StreamDelta | None:
        """The next delta; None at the end. Raises what ended the stream instead."""
        try:
            return await self._buffer.read()
        except asyncio.CancelledError:
            self.drop()
            raise

    def forward(self, put: Callable[[StreamItem], None]) -> None:
        """Hand what came and what comes to `put`, called on the client's loop."""
        self._buffer.forward(put)

    def abort(self) -> None:
        """Ask the service to stop; the stream goes on to its end, with reason `abort`."""
        self._connection.abort(self._request_id)

    def drop(self) -> None:
        """Stop the request and hear nothing more of it; a reader gets ClosedError."""
        if not self._buffer.ended:
            self._connection.drop(self._request_id)
            self._buffer.on_error(ClosedError("this stream was closed"))

    async def aclose(self) -> None:
        """The same as `drop`."""
        self.drop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.drop()


class StreamCursor:
    """One pass over a stream. It dies with the loop over it, and a request that has not ended by
    then is dropped: that is how `break` aborts."""

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream

    def __aiter__(self) -> StreamCursor:
        return self

    async def __anext__(self) -> StreamDelta:
        delta = await self._stream.read()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def __del__(self) -> None:
        self._stream.drop()
