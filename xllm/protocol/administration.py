"""What an administrator has a router change, each with the answer that says it is done: sleep,
roles, objectives.
"""

from __future__ import annotations

from xllm.protocol.message import MapMessage


class SetModelSleep(MapMessage, tag="set_sleep", frozen=True):
    """Put a model to sleep, or wake it, at all its instances. What runs has `timeout_ms` to end.
    `drop_weights`: waking reads them again."""

    id: int
    model: str
    asleep: bool
    timeout_ms: int = 0
    drop_weights: bool = False


class SetRole(MapMessage, tag="set_role", frozen=True):
    """Say what an instance is for: `both`, `prefill` or `decode`. For the router that leads."""

    id: int
    instance: str
    role: str


class SetObjectives(MapMessage, tag="set_objectives", frozen=True):
    """Set the objectives of requests that name none, at all routers; 0: each instance's own again,
    nil: as it is. For the router that leads."""

    id: int
    ttft_ms: int | None = 0
    tpot_ms: int | None = 0


class ModelSleepSet(MapMessage, tag="sleep_set", frozen=True):
    """Answer to `set_sleep`: the model sleeps, or takes requests."""

    id: int
    model: str
    asleep: bool


class RoleSet(MapMessage, tag="role_set", frozen=True):
    """Answer to `set_role`: the instance is told with the next heartbeat."""

    id: int
    instance: str
    role: str


class ObjectivesSet(MapMessage, tag="objectives_set", frozen=True):
    """Answer to `set_objectives`: the registry has them. Both, whichever was set."""

    id: int
    ttft_ms: int = 0
    tpot_ms: int = 0
