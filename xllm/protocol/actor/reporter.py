"""Telling the launcher how a start goes; without a launcher, nobody is told."""

from __future__ import annotations

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
