"""What the service keeps of a request beside its state: where its words go, and since when."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, Protocol

import msgspec

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


class InflightRequest(msgspec.Struct, eq=False):
    """A request without a terminal message. `state` is None while its text is encoded, and while
    it waits for an instance with room. (A Struct is made several times faster than an object of
    Python's.)"""

    client_id: int
    sink: Sink
    started: float
    deadline: float
    state: RequestLife | None = None
    encoding: asyncio.Future[Any] | None = None
    life: int = 1
    """Its first attempt here; above 1: another router was lost with it."""
    num_held: int = 0
    """Tokens that it brought along from there."""
    placed: str = ""
    """The instance whose requests it counts among."""
    is_moving: bool = False
    """Whether its next placing is a move that may have to wait."""
    told: bool = False
    """Whether a first token was handed out."""
    account: str = ""
    """Under whose limits it falls, once it was let in."""
    counted: bool = False
    """Whether its account has limits, and counts it among its open requests."""

    def resumes(self, point: ResumePoint) -> None:
        """It was another router's, up to there."""
        self.life = next_life(point.attempt)
        self.num_held = sum(map(len, point.outputs))


@dataclasses.dataclass(frozen=True, slots=True)
class DispatcherStatistics:
    """Counts of open requests at one moment."""

    num_open: int
    num_encoding: int
    """Whose text is still being encoded, or that wait for an instance with room."""
    num_homeless: int
    """That lost their instance and wait for another."""
