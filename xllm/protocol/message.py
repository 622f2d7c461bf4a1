"""The two shapes of a message, and nothing else.

Client-facing messages are maps: self-describing, so that any language's MessagePack library can
speak them. Internal messages are arrays. Both are frozen and tagged; fields are only ever
appended, with defaults, so that old and new processes understand each other.
"""

from __future__ import annotations

import msgspec


class MapMessage(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", gc=False
):
    """A client-facing message: a map with a `type` entry."""


class ArrayMessage(
    msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, tag=True, gc=False
):
    """An internal message: an array whose first element is its class's name."""


class ArrayPart(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """A part of an internal message: an array without a tag."""


class MapPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A part of a client-facing message: a map without a tag."""
