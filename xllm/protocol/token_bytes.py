"""Token ids as bytes: 32 bits each, little-endian, one after the other.

What hashes are made of, and how long prompts travel: fifty thousand ids are fifty thousand objects
to a codec, and one to a copy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

TOKEN_BYTES = 4
PACK_FROM = 64
"""Prompts of so many tokens travel so."""
_LITTLE_ENDIAN = sys.byteorder == "little"


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """The ids as bytes. OverflowError for ids outside 32 bits."""
    packed = array("I", token_ids)
    if not _LITTLE_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> array[int]:
    """The ids of such bytes. ValueError where these are no whole number of ids."""
    ids = array("I")
    ids.frombytes(data)
    if not _LITTLE_ENDIAN:
        ids.byteswap()
    return ids
