"""Telling the launcher how a start goes; without a launcher, nobody is told."""

from __future__ import annotations

import asyncio
import os

import msgspec

from xllm.errors import TransportError
from xllm.protocol.codec import Decoder
from xllm.protocol.launch import (
    LaunchMessage,
    ProcessFailed,
    ProcessProgress,
    ProcessReady,
    ProcessStarted,
    ProcessStopping,
)
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket

LAST_WORD_S = 0.5
"""What a last report gets to leave the socket, which closes without lingering."""
_ON_ITS_WAY_S = 0.1
_POLL_S = 0.01


class LaunchReporter:
    """Sends LaunchMessages to `endpoint` (empty: to nobody). A word that cannot be sent costs a
    line on a screen, no more."""

    def __init__(self, transport: Transport, endpoint: str, kind: str, name: str) -> None:
        self._kind = kind
        self._name = name
        self._socket: DealerSocket[LaunchMessage] | None = None
        if endpoint:
            self._socket = DealerSocket(
                transport, endpoint, Decoder(LaunchMessage), lambda message, frames: None
            )

    def started(self, detail: str = "") -> None:
        """The process runs."""
        self._send(ProcessStarted(self._kind, self._name, os.getpid(), detail))

    def progress(self, done: int, total: int, unit: str = "bytes") -> None:
        """A long start has come so far."""
        self._send(ProcessProgress(self._kind, self._name, done, total, unit))

    def ready(self, addresses: tuple[tuple[str, str], ...] = (), detail: str = "") -> None:
        """The process does its work from now on."""
        self._send(ProcessReady(self._kind, self._name, os.getpid(), addresses, detail))

    def failed(self, code: str, message: str) -> None:
        """The process cannot go on."""
        self._send(ProcessFailed(self._kind, self._name, code, message))

    def stopping(self, num_open: int) -> None:
        """The process drains."""
        self._send(ProcessStopping(self._kind, self._name, num_open))

    async def wait_sent(self, timeout_s: float = LAST_WORD_S) -> bool:
        """Wait until what was reported has left; False where nobody took it in time."""
        if self._socket is None:
            return False
        try:
            async with asyncio.timeout(timeout_s):
                # No event tells that a queue is empty.
                while not self._socket.connected or self._socket.statistics().num_queued:  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            return False
        await asyncio.sleep(_ON_ITS_WAY_S)  # ZeroMQ has it: from there to the kernel
        return True

    def close(self) -> None:
        """Close the connection to the launcher."""
        if self._socket is not None:
            self._socket.close()

    def _send(self, message: msgspec.Struct) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(message)
        except TransportError:
            pass  # see the class: no more than a line is lost
