"""The table of all settings: what may be set, of which type, within which bounds.

Derived from the dataclasses of `settings` alone: a field added there is a flag, a variable and a
key of the file at once. Knows nothing of where a value comes from.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping

from xllm.config.field import SettingInfo, setting_info
from xllm.config.settings import Settings
from xllm.errors import ConfigError

_SIZE = re.compile(r"(\d+)\s*([KMGT])(?:i?B)?", re.IGNORECASE)
_SIZE_SHIFT = {"K": 10, "M": 20, "G": 30, "T": 40}
_WORDS = {"1": True, "true": True, "yes": True, "on": True}
_WORDS |= {"0": False, "false": False, "no": False, "off": False}


@dataclasses.dataclass(frozen=True)
class SettingEntry:
    """One setting: `section.field`, its type (str, int, float or bool), default and bounds."""

    section: str
    name: str
    type: type
    default: object
    info: SettingInfo

    @property
    def key(self) -> str:
        """How the setting is called in messages: `section.field`."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """`--section-field`."""
        return f"--{self.section}-{self.name}".replace("_", "-")

    @property
    def variable(self) -> str:
        """`XLLM_SECTION_FIELD`."""
        return f"XLLM_{self.section}_{self.name}".upper()


def setting_table() -> dict[str, SettingEntry]:
    """Every setting by its key, in the order of the dataclasses."""
    entries: dict[str, SettingEntry] = {}
    sections = typing.get_type_hints(Settings)
    for section, cls in sections.items():
        types = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            entry = SettingEntry(
                section, field.name, types[field.name], field.default, setting_info(field)
            )
            entries[entry.key] = entry
    return entries


def check_value(entry: SettingEntry, value: object, where: str) -> object:
    """The value in the setting's own type. Texts are parsed where the type is another.

    ConfigError names the setting, where the value came from, and the bound."""
    parsed = _parse(entry, value, where) if isinstance(value, str) else value
    if entry.type is float and type(parsed) is int:
        parsed = float(parsed)
    if type(parsed) is not entry.type:
        raise ConfigError(
            f"{entry.key} ({where}) must be {describe_kind(entry)}, not {value!r}", param=entry.key
        )
    _check_bounds(entry, parsed, where)
    return parsed


def build_settings(values: Mapping[str, object]) -> Settings:
    """Settings with these values by key, defaults elsewhere."""
    parts: dict[str, object] = {}
    for section, cls in typing.get_type_hints(Settings).items():
        prefix = section + "."
        own = {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}
        parts[section] = cls(**own)
    return Settings(**typing.cast("dict[str, typing.Any]", parts))


def near_matches(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _parse(entry: SettingEntry, text: str, where: str) -> object:
    if entry.type is str:
        return text
    plain = text.strip()
    if entry.type is bool and plain.lower() in _WORDS:
        return _WORDS[plain.lower()]
    if entry.type is int:
        size = _SIZE.fullmatch(plain) if entry.info.unit == "bytes" else None
        if size is not None:
            return int(size[1]) << _SIZE_SHIFT[size[2].upper()]
        if re.fullmatch(r"[+-]?\d{1,20}", plain):
            return int(plain)
    if entry.type is float and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", plain):
        return float(plain)
    raise ConfigError(
        f"{entry.key} ({where}) must be {describe_kind(entry)}, not {text!r}", param=entry.key
    )


def describe_kind(entry: SettingEntry) -> str:
    """What a value of it is, in words: `a whole number of bytes`."""
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    unit = entry.info.unit
    return words[entry.type] + (f" of {unit}" if unit else "")


def _check_bounds(entry: SettingEntry, value: object, where: str) -> None:
    info = entry.info
    if info.choices and value not in info.choices:
        raise ConfigError(
            f"{entry.key} ({where}) must be one of {', '.join(info.choices)}, not {value!r}",
            param=entry.key,
        )
    if isinstance(value, int | float):
        unit = f" {info.unit}" if info.unit else ""
        if info.low is not None and not value >= info.low:
            raise ConfigError(
                f"{entry.key} ({where}) must be at least {_plain(info.low)}{unit}, not {value}",
                param=entry.key,
            )
        if info.high is not None and not value <= info.high:
            raise ConfigError(
                f"{entry.key} ({where}) must be at most {_plain(info.high)}{unit}, not {value}",
                param=entry.key,
            )


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)
