"""What is wrong with a value that is no instance of its type, in the words of JSON and of people,
from what msgspec says of it. Pure."""

from __future__ import annotations

import re

_PLACE = re.compile(r"`\$\.?([^`]*?)(?:\[\.\.\.\])?`$|missing required field `(\w+)`$")
_EXPECTED = re.compile(r"Expected `([a-z |]+)`, got `([a-z]+)`(?: - at `\$\.?([^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(\w+)`(?: - at `\$\.?([^`]*)`)?")
_BOUND = re.compile(r"Expected `int` ([<>]=) (-?\d+) - at `\$\.?([^`]*)`")
_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_GIVEN = {**_WANTED, "bool": "a boolean", "float": "a fraction"}
_BOUNDS = {"<=": "at most", ">=": "at least"}


def explain(text: str, whole: str) -> tuple[str, str | None]:
    """(What to tell who gave it, the field that is wrong, if one is), for a ValidationError's
    text. What is not known here is told as it is. `whole`: what the value itself is called."""
    place = _PLACE.search(text)
    param = next((group for group in place.groups() if group), None) if place else None
    if match := _EXPECTED.fullmatch(text):
        kinds = match[1].split(" | ")
        # null is the same as no field: nobody has to hear of it.
        wanted = [_WANTED.get(kind, kind) for kind in kinds if kind != "null" or len(kinds) == 1]
        given = _GIVEN.get(match[2], match[2])
        return f"{match[3] or whole} must be {' or '.join(wanted)}, not {given}", param
    if match := _MISSING.fullmatch(text):
        return f"{match[2]}.{match[1]} is missing" if match[2] else f"{match[1]} is missing", param
    if match := _BOUND.fullmatch(text):
        return f"{match[3]} must be {_BOUNDS[match[1]]} {match[2]}", param
    return text[:200].replace("`$.", "`"), param
