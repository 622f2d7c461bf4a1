"""What is wrong with a value, in the words of JSON and of people: of one that is no instance of its
type from what msgspec says of it, and of one that somebody else called by another name. Pure."""

from __future__ import annotations

import re

_PLACE = re.compile(r"`\$\.?([^`]*?)(?:\[\.\.\.\])?`$|missing required field `(\w+)`$")
_EXPECTED = re.compile(
    r"Expected `([a-z |]+)`, got `([\w.]+)`(?: - at (`key` in )?`\$\.?([^`]*)`)?"
)
_TOO_LONG = re.compile(r"Integer value out of range(?: - at (`key` in )?`\$\.?([^`]*)`)?")
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
_GIVEN = {**_WANTED, "bool": "a boolean", "float": "a fraction", "None": "null"}
_BOUNDS = {"<=": "at most", ">=": "at least"}
_SHOWN_BITS = 64
"""A larger number is told by its length: it may have thousands of digits."""


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
        what = _called(match[4] or "", whole, of_keys=bool(match[3]))
        return f"{what} must be {' or '.join(wanted)}, not {given}", param
    if match := _TOO_LONG.fullmatch(text):
        what = _called(match[2] or "", whole, of_keys=bool(match[1]))
        return f"{what} must be a number of fewer digits", param
    if match := _MISSING.fullmatch(text):
        return f"{match[2]}.{match[1]} is missing" if match[2] else f"{match[1]} is missing", param
    if match := _BOUND.fullmatch(text):
        return f"{match[3]} must be {_BOUNDS[match[1]]} {match[2]}", param
    return text[:200].replace("`$.", "`"), param


def _called(place: str, whole: str, *, of_keys: bool) -> str:
    """A place in a value. Of a map's keys and values it is known only that they are such."""
    of = place.removesuffix("[...]") or whole
    if of_keys:
        return f"each key of {of}"
    return of if place == of or not place else f"each value of {of}"


def renamed(message: str, param: str | None, inner: str, outer: str) -> tuple[str, str] | None:
    """(message, field) of an error of the field `inner`, or of a place in it, for someone who
    calls it `outer`; None where the error is of another field, or of none."""
    if param is None or (param != inner and not param.startswith(f"{inner}[")):
        return None
    rest = message.removeprefix(inner)
    told = f"{outer}: {message}" if rest == message else outer + rest
    return told, outer + param.removeprefix(inner)


def shown(number: int) -> str:
    """A number that somebody gave, for an error's text."""
    bits = number.bit_length()
    return str(number) if bits <= _SHOWN_BITS else f"a number of {bits} bits"
