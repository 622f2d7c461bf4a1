"""CPUs named in a setting: lists and ranges as the kernel writes them, `0-3,8`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from xllm.errors import ConfigError

AUTO, NONE = "auto", "none"
AFFINITY = "worker.cpu_affinity"
_MAX_CPU = 4095


def parse_cpus(text: str) -> tuple[int, ...]:
    """The numbers of `0-3,8`, in that order. ConfigError naming worker.cpu_affinity for anything
    that is not a list of different CPUs."""
    found: dict[int, None] = {}
    for part in text.split(","):
        for number in _numbers(part.strip(), text):
            if number in found:
                raise _refused(text, f"CPU {number} is there twice")
            found[number] = None
    return tuple(found)


def format_cpus(numbers: Collection[int]) -> str:
    """The shortest list of these numbers, ascending: `0-3,8`."""
    parts: list[str] = []
    ordered = sorted(numbers)
    at = 0
    while at < len(ordered):
        end = at
        while end + 1 < len(ordered) and ordered[end + 1] == ordered[end] + 1:
            end += 1
        parts.append(str(ordered[at]) if end == at else f"{ordered[at]}-{ordered[end]}")
        at = end + 1
    return ",".join(parts)


def share_cpus(text: str, index: int, count: int) -> str:
    """The part that the `index`-th of `count` instances of one machine gets of the setting."""
    if text == NONE or count == 1:
        return text
    if text == AUTO:
        raise ConfigError(
            f"{AFFINITY}=auto would give {count} instances the same cores: name them all, and they "
            f"are shared out",
            param=AFFINITY,
        )
    own = parse_cpus(text)
    each = len(own) // count
    if not each:
        raise ConfigError(
            f"{AFFINITY}: {len(own)} CPUs for {count} instances (serve.instances)", param=AFFINITY
        )
    return format_cpus(own[index * each : (index + 1) * each])


def is_list(text: str) -> bool:
    """Whether the setting names CPUs."""
    return text not in (AUTO, NONE)


def check_affinity(text: str) -> None:
    """ConfigError where the setting is neither auto nor none nor a list."""
    if is_list(text):
        parse_cpus(text)


def _numbers(part: str, text: str) -> Iterator[int]:
    first, dash, last = part.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise _refused(text, f"{part!r} is neither a CPU's number nor a range")
    begin, end = int(first), int(last) if dash else int(first)
    if not begin <= end <= _MAX_CPU:
        raise _refused(text, f"{part} does not go up, or beyond CPU {_MAX_CPU}")
    yield from range(begin, end + 1)


def _refused(text: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{AFFINITY} must be auto, none or CPUs as 0-3,8, not {text!r}: {reason}", param=AFFINITY
    )
