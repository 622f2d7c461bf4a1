"""How urgent work is, from its deadline and what it will take.

A deadline is the arrival plus the objective for the first token, or the first token plus so many
objectives for later ones. Four classes, in this order: STARVED (late by LATE_FACTOR objectives;
the earliest deadline first), URGENT (what is left is less than everything in sight takes; the
densest first: weight by predicted time), NORMAL (the earliest deadline first), OFFLINE (no
deadline; by arrival). Bound: once a request is late by LATE_FACTOR objectives nobody starts
before it who has a later deadline, hence nobody who came after it had become late. Numbers only.
"""

from __future__ import annotations

import enum

LATE_FACTOR = 1.0
MIN_STEP_SHARE = 0.65
"""Steps are not cut shorter than this share of the tightest objective for later tokens."""
MAX_WEIGHT_POWER = 8


class Urgency(enum.IntEnum):
    """Classes, the smaller the earlier."""

    STARVED = 0
    URGENT = 1
    NORMAL = 2
    OFFLINE = 3


Rank = tuple[int, float, tuple[bool, int, int, int]]
"""(class, what orders it, the sequence's unique key): the smaller, the earlier. Never equal."""


def weight(priority: int) -> float:
    """What a request is worth: twice as much with each step of its priority, within bounds."""
    return float(2.0 ** max(-MAX_WEIGHT_POWER, min(MAX_WEIGHT_POWER, priority)))


def classify(deadline: float, objective_s: float, now: float, load_s: float) -> Urgency:
    """The class of online work. `load_s`: predicted time of all that is in sight."""
    left = deadline - now
    if left < -LATE_FACTOR * objective_s:
        return Urgency.STARVED
    return Urgency.URGENT if left < load_s else Urgency.NORMAL


def rank(
    key: tuple[bool, int, int, int],
    deadline: float,
    objective_s: float,
    cost_s: float,
    now: float,
    load_s: float,
) -> Rank:
    """Where work stands. `key`: (offline, -priority, arrival, choice)."""
    if key[0]:
        return int(Urgency.OFFLINE), 0.0, key
    urgency = classify(deadline, objective_s, now, load_s)
    if urgency is Urgency.URGENT:
        return int(urgency), -weight(-key[1]) / max(cost_s, 1e-9), key
    return int(urgency), deadline, key


def step_limit_s(slacks: list[float], tightest_s: float) -> float:
    """What a step may take so that the decodes that are still in time stay so. `slacks`: time to
    the deadline of each decode's next token; `tightest_s`: the smallest objective among them."""
    in_time = [slack for slack in slacks if slack > 0.0]
    return max(min(in_time, default=0.0), MIN_STEP_SHARE * tightest_s)


def may_wait(slack_s: float, step_s: float) -> bool:
    """Whether a decode can be left out of a step of this length and its next token still comes
    in time: another step of that length must fit after it."""
    return slack_s > 2.0 * step_s
