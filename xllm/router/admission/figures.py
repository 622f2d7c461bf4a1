"""What admission did, as plain counts of the loop's thread."""

from __future__ import annotations

import dataclasses

from xllm.router.metrics import Histogram

MAX_TENANTS = 50
"""Tenants with a label of their own; further ones are `other`."""


@dataclasses.dataclass(slots=True)
class AdmissionFigures:
    """Since the start."""

    rejected: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    """By reason and tenant. limit: of the tenant; queue: the line is full; shed: sent away for
    another; timeout: no room in time."""
    wait: Histogram = dataclasses.field(default_factory=Histogram)
    """Seconds in the line, of those that left it for an instance or for good."""
    _tenants: set[str] = dataclasses.field(default_factory=set)

    def reject(self, why: str, tenant: str) -> None:
        """A request was sent away."""
        if tenant not in self._tenants:
            if len(self._tenants) < MAX_TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = "other"
        key = (why, tenant)
        self.rejected[key] = self.rejected.get(key, 0) + 1

    def waited(self, seconds: float) -> None:
        """A request was in the line for so long."""
        self.wait.observe(seconds)
