"""Several models at one worker: whose step comes next.

Start-time fair queueing: every model has a virtual time, which its steps advance by what they
take; the one whose next step would begin the earliest goes first. A model that had nothing to do
comes back at the time of those that had: it neither overtakes them for what it did not use nor
waits for it. Between two that have work, the time they had differs by no more than a step of each.
A step is charged with what the model's last one took and corrected when it comes back. Pure.
Invariant: no more plans are under way than the worker is to have.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class _Account:
    """Of a model. `until`: the virtual time that its steps so far have taken it to."""

    until: float = 0.0
    last_s: float = 0.0
    charged: list[float] = dataclasses.field(default_factory=list)  # plans under way, oldest first
    used: int = 0  # when it last had a turn, as a count


class StepTurns:
    """Models by name. `max_in_flight`: plans of all of them at the worker at a time."""

    def __init__(self, models: tuple[str, ...], max_in_flight: int) -> None:
        assert max_in_flight >= 1
        self._accounts = {model: _Account() for model in models}
        self._max_in_flight = max_in_flight
        self._now = 0.0
        self._count = 0

    @property
    def has_room(self) -> bool:
        """Whether another plan may leave."""
        under_way = sum([len(one.charged) for one in self._accounts.values()])
        return under_way < self._max_in_flight

    def is_clear(self, but: str) -> bool:
        """Whether no plan is under way, but for those of one model."""
        return not any(one.charged for name, one in self._accounts.items() if name != but)

    def order(self) -> list[str]:
        """All models, whose turn it is first; of equals the one whose last turn is longest ago."""
        accounts = self._accounts
        if len(accounts) == 1:
            return list(accounts)
        return sorted(
            accounts, key=lambda name: (max(accounts[name].until, self._now), accounts[name].used)
        )

    def sent(self, model: str) -> None:
        """A plan of the model left. Mutates."""
        account = self._accounts[model]
        self._now = max(account.until, self._now)
        account.until = self._now + account.last_s
        account.charged.append(account.last_s)
        self._count += 1
        account.used = self._count

    def done(self, model: str, seconds: float) -> None:
        """Its oldest plan under way came back, or failed: 0 seconds tell nothing. Mutates."""
        account = self._accounts[model]
        charged = account.charged.pop(0)
        if seconds > 0:
            account.until += seconds - charged
            account.last_s = seconds

    def forget(self, model: str) -> None:
        """What is under way of the model will not be answered. Mutates."""
        self._accounts[model].charged.clear()
