"""Merging Prometheus texts of several processes into one, labelled by role and instance.

Pure. Prometheus wants all samples of a metric in one group under one HELP and TYPE; the texts of
the processes name the same metrics, so samples are regrouped by metric. Lines that are no
samples are dropped, and those of a series that is there already: what another process sent must
not break the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SAMPLE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+"
    r"([+-]?(?:Inf|NaN|[0-9][0-9.eE+-]*))(?:\s+-?[0-9]+)?"
)
_LABEL_NAME = re.compile(r'(?:^|,)\s*([a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\.)*"')
_SUFFIXES = ("_bucket", "_count", "_sum", "_total", "_created", "_info")
MAX_TEXT_BYTES = 1 << 20
"""More than this of one process is cut."""


class _Family:
    __slots__ = ("header", "samples")

    def __init__(self) -> None:
        self.header: dict[str, str] = {}
        self.samples: list[str] = []


def merge_texts(texts: Iterable[tuple[Mapping[str, str], bytes]]) -> bytes:
    """One text of all samples. Each text comes with labels, added where a sample has none of
    that name."""
    families: dict[str, _Family] = {}
    known: set[str] = set()
    for labels, text in texts:
        current = ""
        for line in text[:MAX_TEXT_BYTES].decode("utf-8", "replace").split("\n"):
            if line.startswith(("# HELP ", "# TYPE ")):
                current = line.split(" ", 3)[2]
                family = families.setdefault(current, _Family())
                family.header.setdefault(line[2:6], line)
            elif line and not line.startswith("#"):
                _add_sample(families, known, current, line, labels)
    lines = []
    for family in families.values():
        if family.samples:
            lines += [family.header[key] for key in ("HELP", "TYPE") if key in family.header]
            lines += family.samples
    return ("\n".join(lines) + "\n").encode() if lines else b""


def _add_sample(
    families: dict[str, _Family],
    seen: set[str],
    current: str,
    line: str,
    labels: Mapping[str, str],
) -> None:
    match = _SAMPLE.fullmatch(line.strip())
    if match is None:
        return
    name, given, value = match.groups()
    given = (given or "").strip().rstrip(",")
    known = set(_LABEL_NAME.findall(given))
    added = [f'{key}="{_escape(text)}"' for key, text in labels.items() if key not in known]
    both = ",".join([given, *added] if given else added)
    owner = current if _belongs(name, current) else name
    series = f"{name}{{{both}}}" if both else name
    if series not in seen:
        seen.add(series)
        families.setdefault(owner, _Family()).samples.append(f"{series} {value}")


def _belongs(name: str, family: str) -> bool:
    return name == family or (
        bool(family) and name.startswith(family) and name[len(family) :] in _SUFFIXES
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
