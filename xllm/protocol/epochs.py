"""What epochs are counted from. Pure.

An epoch is the registry's *epoch base* and the revision that created the leader key. The base is 0
until somebody claims the key at a revision too low for the epochs that it has heard of: in a
registry that lost its data, or was restored from an older copy. Who claims raises it then to the
highest of these, before leading. Invariant: a registry's base only grows, and is read behind the
claim, under the lease of that; so the next claim, which comes after the end of that lease, has a
higher revision and no lower base, and no two claims have one epoch.
"""

from __future__ import annotations

from xllm.errors import InvalidRequestError
from xllm.protocol.records import LeaderRecord

MAX_BASE = (1 << 62) - 1
"""So that a base and a revision fit in 64 bits. Higher epochs are believed of the registry alone:
against what is merely said no base could be raised."""


def is_out_of_range(epoch: int, known: int) -> bool:
    """Whether nobody is believed to have that epoch who merely says so. `known`: the highest one
    believed until now, of the registry, too."""
    return epoch > max(known, MAX_BASE)


def leader_epoch(record: LeaderRecord, create_revision: int) -> int:
    """The epoch of whom the leader key names; InvalidRequestError naming the bounds of its base."""
    return check_base(record.epoch_base) + create_revision


def read_base(value: bytes | None) -> int:
    """The base of a registry's value (None: no key); InvalidRequestError for anything else than a
    decimal number from 0 to MAX_BASE."""
    if value is None:
        return 0
    return check_base(int(value) if value.isdigit() and len(value) < 20 else -1)


def check_base(base: int) -> int:
    """The base, or InvalidRequestError naming the bounds."""
    if not 0 <= base <= MAX_BASE:
        raise InvalidRequestError(f"epoch_base must be a number from 0 to {MAX_BASE}")
    return base


def raised_base(highest: int) -> int:
    """What the base must be for any claim to exceed the highest epoch known; where that one is
    above MAX_BASE, as near to it as a base can be."""
    return min(highest, MAX_BASE)
