"""What the service keeps of a request beside its state: where its words go, and since when."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, Protocol

from xllm.protocol.instance import InstanceRequest
from xllm.router.front import Sink
from xllm.router.state.request import RequestLife


class InstanceLinks(Protocol):
    """Connections to instances by name."""

    def send(self, instance: str, message: InstanceRequest) -> bool:
        """Send or queue; False where the instance cannot be reached. Must not raise."""
        ...


class InflightRequest:
    """A request without a terminal message. `state` is None while its text is encoded."""

    __slots__ = ("client_id", "deadline", "encoding", "placed", "sink", "started", "state", "told")

    def __init__(self, client_id: int, sink: Sink, started: float, deadline: float) -> None:
        self.client_id = client_id
        self.sink = sink
        self.started = started
        self.deadline = deadline
        self.state: RequestLife | None = None
        self.encoding: asyncio.Future[Any] | None = None
        self.placed = ""
        """The instance whose requests it counts among."""
        self.told = False
        """Whether a first token was handed out."""


@dataclasses.dataclass(frozen=True, slots=True)
class DispatcherStatistics:
    """Counts of open requests at one moment."""

    num_open: int
    num_encoding: int
    """Whose text is still being encoded."""
    num_homeless: int
    """That lost their instance and wait for another."""
