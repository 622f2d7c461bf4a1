"""What one router knows of each other process: its record, and what it last said.

Plain data that `view` keeps, and `traffic` counts in; policies read it.
"""

from __future__ import annotations

import dataclasses

from xllm.protocol.bus import (
    DaemonHeartbeat,
    InstanceLoad,
    RouterPresence,
    WorkerState,
)
from xllm.protocol.records import InstanceRecord


@dataclasses.dataclass(slots=True, eq=False)
class InstanceView:
    """One instance as this router sees it."""

    record: InstanceRecord
    connected: bool = False
    heard_at: float = 0.0
    """When its last heartbeat came (or it was registered)."""
    seq: int = 0
    """Of its last heartbeat; 0: none yet."""
    state: str = "unknown"
    role: str = "both"
    load: InstanceLoad = dataclasses.field(default_factory=InstanceLoad)
    metrics: bytes = b""
    workers: tuple[WorkerState, ...] = ()
    num_inflight: int = 0
    """Requests of this router that run there."""
    inflight_then: int = 0
    """Those of them that its last heartbeat counts."""
    num_elsewhere: int = 0
    """Requests of other routers there, as these last said."""
    unseen_tokens: int = 0
    """Prompt tokens sent there since its last heartbeat, less what is cached."""
    full_from: int = -1
    """With so many requests of this router it said that its queue is full; -1: it did not say so
    since its last heartbeat."""
    num_gaps: int = 0
    silent: bool = False
    deaf: bool = False
    """It does not hear this router, though it may speak."""
    draining: bool = False
    """It said so in its last heartbeat: when it goes, it has left."""
    leaving: bool = False
    """Its record is gone: it drains, and says so, or it alone lost the registry."""
    replaced: bool = False
    """Its name is that of a process that cannot be used here: when it goes, nobody is missing."""
    listed_at: float = 0.0
    """When this router read that it is registered."""
    expected: bool = True
    """Nothing came from it yet that tells whether it takes requests."""

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.record.name

    @property
    def suspect(self) -> bool:
        """Whether its requests are better off elsewhere."""
        return self.silent or self.deaf

    @property
    def usable(self) -> bool:
        """Whether requests may be sent there."""
        return self.connected and not self.suspect and self.state == "ready"


@dataclasses.dataclass(slots=True, eq=False)
class DaemonView:
    """One KV cache daemon as heard of."""

    heartbeat: DaemonHeartbeat
    heard_at: float


@dataclasses.dataclass(slots=True, eq=False)
class RouterView:
    """Another router as heard of."""

    presence: RouterPresence
    heard_at: float
