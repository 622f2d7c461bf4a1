"""The role table: what each instance is for, and who still has to be told. Pure.

The leader alone changes it and writes it to the registry, where the next leader finds it. An
instance that is in no row has the role `both`. Rows of instances that are away stay if they say
anything else: they may come back under their names.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from xllm.errors import InvalidRequestError
from xllm.protocol.instance import ROLES

DEFAULT_ROLE = "both"
MAX_ROWS = 1024
MAX_NAME_CHARS = 200
TELL_AGAIN_S = 1.0
"""An instance that says another role than it was told is told again after this."""


class RoleTable:
    """Roles by instance, as wanted; and, under the present epoch, as told."""

    def __init__(self) -> None:
        self._wanted: dict[str, str] = {}
        self._told: dict[str, tuple[str, str, float]] = {}
        """By instance: its incarnation, the role, and when."""
        self.is_changed = False
        """Whether the registry has another table than this one."""

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """(instance, role) by name."""
        return tuple(sorted(self._wanted.items()))

    def begin(self, value: bytes) -> None:
        """A new epoch: the table as the registry has it (empty: none), and nobody told yet.
        InvalidRequestError where it cannot be read; the table is then as it was."""
        self._told.clear()
        rows = decode_roles(value) if value else {}
        self._wanted = {name: role for name, role in rows.items() if role != DEFAULT_ROLE}
        self.is_changed = len(self._wanted) != len(rows)

    def encode(self) -> bytes:
        """The table as the registry's value: a JSON object."""
        return msgspec.json.encode(dict(self.rows))

    def written(self, value: bytes) -> None:
        """The registry has that value."""
        if value == self.encode():
            self.is_changed = False

    def assign(self, instance: str, role: str) -> None:
        """From now on. InvalidRequestError naming the bound."""
        check_row(instance, role)
        if instance not in self._wanted and len(self._wanted) >= MAX_ROWS:
            raise InvalidRequestError(f"{MAX_ROWS} rows are the most", param="instance")
        if self._wanted.get(instance) != role:
            self._wanted[instance] = role
            self.is_changed = True

    def registered(self, instance: str) -> None:
        """An instance is there: it has a row, once it was told under this epoch. (One that knows a
        higher epoch refuses: who leads under a lower one does not know the rows either.)"""
        is_new = instance not in self._wanted and instance in self._told
        if is_new and len(self._wanted) < MAX_ROWS:
            self.assign(instance, DEFAULT_ROLE)

    def due(self, instances: Iterable[tuple[str, str, str]], now: float) -> list[tuple[str, str]]:
        """(instance, role) of those to be told now. `instances`: (name, incarnation, the role it
        says) of those that can be reached."""
        found = []
        for name, incarnation, says in instances:
            wanted = self._wanted.get(name, DEFAULT_ROLE)
            told = self._told.get(name)
            is_told = told is not None and told[:2] == (incarnation, wanted)
            if is_told and told is not None and (says == wanted or now < told[2] + TELL_AGAIN_S):
                continue
            found.append((name, wanted))
        return found

    def told(self, instance: str, incarnation: str, role: str, now: float) -> None:
        """The word is on its way."""
        self._told[instance] = (incarnation, role, now)

    def forgot(self, instance: str) -> None:
        """An instance may not know what it was told: it will be told again."""
        self._told.pop(instance, None)

    def gone(self, instance: str) -> None:
        """An instance left."""
        self.forgot(instance)
        if self._wanted.get(instance) == DEFAULT_ROLE:
            del self._wanted[instance]
            self.is_changed = True


def check_row(instance: str, role: str) -> None:
    """InvalidRequestError unless the table may have this row."""
    if not 0 < len(instance) <= MAX_NAME_CHARS:
        raise InvalidRequestError(f"a name has 1 to {MAX_NAME_CHARS} characters", param="instance")
    if role not in ROLES:
        raise InvalidRequestError(
            f"role must be one of {', '.join(ROLES)}, not {role[:40]!r}", param="role"
        )


def restore_rows(value: bytes | None, lost: Iterable[tuple[str, str]]) -> tuple[bytes | None, int]:
    """The registry's value (None: no key) with the rows that it has lost, as far as none were
    written since; and how many of them find no room beside rows that say more than DEFAULT_ROLE,
    which go first. A value that is no table stays as it is."""
    try:
        rows = decode_roles(value) if value else {}
    except InvalidRequestError:
        return value, 0
    missing = [one for one in lost if one[0] not in rows and one[1] != DEFAULT_ROLE]
    if not missing:
        return value, 0
    telling = [one for one in rows.items() if one[1] != DEFAULT_ROLE]
    silent = [one for one in rows.items() if one[1] == DEFAULT_ROLE]
    num_left_out = max(len(telling) + len(missing) - MAX_ROWS, 0)
    return msgspec.json.encode(dict([*telling, *missing, *silent][:MAX_ROWS])), num_left_out


def decode_roles(value: bytes) -> dict[str, str]:
    """The rows of a registry's value; InvalidRequestError for anything that is no table."""
    try:
        rows = msgspec.json.decode(value, type=dict[str, str])
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the role table is no JSON object of roles: {error}") from error
    if len(rows) > MAX_ROWS:
        raise InvalidRequestError(f"{len(rows)} rows; {MAX_ROWS} are the most")
    for instance, role in rows.items():
        check_row(instance, role)
    return rows
