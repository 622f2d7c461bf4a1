"""The tables of docs/operations.md, from the settings and the exceptions."""

from __future__ import annotations

from xllm.config.table import SettingEntry, setting_table
from xllm.errors import error_classes


def settings_reference() -> str:
    """One table a section: name, flag, type, default, bounds, meaning."""
    lines: list[str] = []
    section = ""
    for entry in setting_table().values():
        if entry.section != section:
            section = entry.section
            lines += ["", f"### [{section}]", ""]
            lines += ["| setting | flag | default | bounds | meaning |", "|---|---|---|---|---|"]
        lines.append(
            f"| `{entry.name}` | `{entry.flag}` | {_default(entry)} | {_bounds(entry)} "
            f"| {entry.info.doc} |"
        )
    return "\n".join(lines).strip() + "\n"


def _default(entry: SettingEntry) -> str:
    value = entry.default
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value} {entry.info.unit}".strip()


def _bounds(entry: SettingEntry) -> str:
    info = entry.info
    if info.choices:
        return ", ".join(f"`{choice}`" for choice in info.choices)
    if entry.type is bool:
        return "on, off"
    low = "" if info.low is None else f"at least {info.low:.9g}"
    high = "" if info.high is None else f"at most {info.high:.9g}"
    return ", ".join(part for part in (low, high) if part) or "any"


def errors_reference() -> str:
    """Wire code, HTTP status, exception, meaning."""
    lines = ["| code | HTTP status | exception | meaning |", "|---|---|---|---|"]
    for code, cls in sorted(error_classes().items()):
        meaning = " ".join((cls.__doc__ or "").split())
        lines.append(f"| `{code}` | {cls.http_status} | `{cls.__name__}` | {meaning} |")
    return "\n".join(lines) + "\n"
