"""Streams that are asked for over ZeroMQ and whose tokens go nowhere."""

from __future__ import annotations

import asyncio

from xllm.client.asynchronous import AsyncClient
from xllm.client.open_request import EndMessage
from xllm.client.requests import build_submit
from xllm.errors import XllmError
from xllm.protocol.generation import TokenDelta

_ASK_S = 120.0


class SilentAsker:
    """A listener that keeps nothing. `begun`: the first word of its request came."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_delta(self, delta: TokenDelta) -> None:
        """Tokens."""
        self._begin()

    def on_end(self, message: EndMessage) -> None:
        """The good end."""
        self._begin()

    def on_error(self, error: XllmError) -> None:
        """The bad end: as good as any here."""
        self._begin()

    def _begin(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)


def ask_for_nobody(client: AsyncClient, index: int, num_tokens: int) -> SilentAsker:
    """One stream of so many tokens, its prompt by `index`."""
    connection = client.connection
    message = build_submit(
        connection.next_id(),
        {"max_tokens": num_tokens, "ignore_eos": True},
        timeout_s=_ASK_S,
        stream=True,
        prompt=(20 + index % 200, 30, 40),
    )
    asker = SilentAsker()
    connection.ask(message, asker, _ASK_S)
    return asker
