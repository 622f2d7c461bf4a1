"""A master that only listens and asks: the worker's peer in these tests."""

from __future__ import annotations

import asyncio

from xllm.protocol.codec import Decoder
from xllm.protocol.step import WorkerMessage, WorkerPulse
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket


class FakeMaster:
    """Binds `endpoint`; keeps what workers say, pulses apart."""

    def __init__(self, transport: Transport, endpoint: str) -> None:
        self.heard: list[WorkerMessage] = []
        self.frames: list[list[bytes]] = []
        self.pulses: list[WorkerPulse] = []
        self.gone = 0
        self.identity = b""
        self.socket = RouterSocket(
            transport, endpoint, Decoder(WorkerMessage), self._on_message, on_gone=self._on_gone
        )

    def _on_message(self, identity: bytes, message: WorkerMessage, frames: list[bytes]) -> None:
        self.identity = identity
        if isinstance(message, WorkerPulse):
            self.pulses.append(message)
        else:
            self.heard.append(message)
            self.frames.append(frames)

    def _on_gone(self, identity: bytes) -> None:
        self.gone += 1

    def send(self, message) -> None:
        self.socket.send(self.identity, message)

    def of(self, kind: type) -> list:
        """What was heard of one kind, in order."""
        return [message for message in self.heard if type(message) is kind]

    async def until(self, condition, timeout_s: float = 10.0) -> None:
        """Wait until the condition holds."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.001)

    async def wait_for(self, kind: type, count: int = 1):
        """The `count`-th message of a kind."""
        await self.until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)[count - 1]
