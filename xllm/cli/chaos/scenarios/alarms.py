"""Who was taken for dead, lost a lease, or stepped down: nobody may be, where nothing died."""

from __future__ import annotations

from xllm.cli.chaos.stage import LOST, Stage
from xllm.cli.chaos.verdict import Injection

ALARMS = (
    *LOST, "worker_lost", "lease_lost", "leadership_ends", "registry_unreachable", "bad_record",
    "actor_call_failed", "handler_failed", "kv_events_silent",
)  # fmt: skip
"""Events of a process that believes that something died, or that breaks."""


class Quiet:
    """From its making on no process may log an alarm, whatever its clock says then."""

    def __init__(self, stage: Stage) -> None:
        stage.cluster.read()
        self._events = stage.cluster.events.events
        self._stage = stage
        self._first = len(self._events)

    def check(self, injection: Injection) -> None:
        """Notes the alarms so far as broken promises."""
        self._stage.cluster.read()
        found = [one for one in self._events[self._first :] if one.name in ALARMS]
        injection.notes["alarms"] = len(found)
        injection.broken += [f"a false alarm: {one.words[:200]}" for one in found[:5]]
