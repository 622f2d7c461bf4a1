"""What the service keeps of a request beside its state: where its words go, and since when."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, Protocol

from xllm.protocol.generation import RequestFailed, RequestFinished, ResumePoint, next_life
from xllm.protocol.instance import InstanceRequest
from xllm.router.front import Sink
from xllm.router.state.request import RequestLife


class InstanceLinks(Protocol):
    """Connections to instances by name."""

    def send(self, instance: str, message: InstanceRequest) -> bool:
        """Send or queue; False where the instance cannot be reached. Must not raise."""
        ...


class AdmissionDoor(Protocol):
    """Where requests came in, as far as they go out or come back there."""

    def left(self, request: InflightRequest, last: RequestFinished | RequestFailed) -> None:
        """A request got its terminal message."""
        ...

    def instances_ready(self) -> None:
        """Instances can take requests now that could not before."""
        ...

    def take_back(self, request: InflightRequest) -> bool:
        """No instance takes it now: whether it waits for one that does, without a state."""
        ...


class InflightRequest:
    """A request without a terminal message. `state` is None while its text is encoded, and while
    it waits for an instance with room."""

    __slots__ = (
        "account",
        "client_id",
        "counted",
        "deadline",
        "encoding",
        "is_moving",
        "life",
        "num_held",
        "placed",
        "sink",
        "started",
        "state",
        "told",
    )

    def __init__(
        self,
        client_id: int,
        sink: Sink,
        started: float,
        deadline: float,
        resume: ResumePoint | None = None,
    ) -> None:
        self.client_id = client_id
        self.sink = sink
        self.started = started
        self.deadline = deadline
        self.state: RequestLife | None = None
        self.encoding: asyncio.Future[Any] | None = None
        self.life = 1 if resume is None else next_life(resume.attempt)
        """Its first attempt here; above 1: another router was lost with it."""
        self.num_held = 0 if resume is None else sum(map(len, resume.outputs))
        """Tokens that it brought along from there."""
        self.placed = ""
        """The instance whose requests it counts among."""
        self.is_moving = False
        """Whether its next placing is a move that may have to wait."""
        self.told = False
        """Whether a first token was handed out."""
        self.account = ""
        """Under whose limits it falls, once it was let in."""
        self.counted = False
        """Whether its account has limits, and counts it among its open requests."""


@dataclasses.dataclass(frozen=True, slots=True)
class DispatcherStatistics:
    """Counts of open requests at one moment."""

    num_open: int
    num_encoding: int
    """Whose text is still being encoded, or that wait for an instance with room."""
    num_homeless: int
    """That lost their instance and wait for another."""
