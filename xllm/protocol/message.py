"""The two shapes of a message, and nothing else.

Client-facing messages are maps: self-describing, so that any language's MessagePack library can
speak them. Internal messages are arrays. Both are frozen and tagged; fields are only ever
appended, with defaults, so that old and new processes understand each other.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL_VERSION = 1
"""Of what processes of a cluster say to each other. Appended fields do not raise it: only a change
that an older process would misunderstand does."""
OLDEST_PROTOCOL = 1
"""The oldest version that is still spoken: one back at least, or nobody can be upgraded in turn."""


def speaks(version: int) -> bool:
    """Whether this process understands one that says that it speaks `version`."""
    return OLDEST_PROTOCOL <= version <= PROTOCOL_VERSION


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


def learn(*kinds: Any) -> None:
    """Have msgspec learn classes of messages. It does so at their first use otherwise, and crashes
    where two threads make that at once: each module does it while it is imported."""
    for kind in kinds:
        msgspec.msgpack.Decoder(kind)
