"""How a setting is declared: a default, a unit, a sentence, and bounds."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class SettingInfo:
    """What is known of a setting beside its type and default."""

    doc: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that carries its SettingInfo."""
    info = SettingInfo(doc, unit, choices, low, high)
    return dataclasses.field(default=default, metadata={"setting": info})


def setting_info(field: dataclasses.Field[Any]) -> SettingInfo:
    """The SettingInfo of a field declared with `setting`."""
    info = field.metadata["setting"]
    assert isinstance(info, SettingInfo)
    return info
