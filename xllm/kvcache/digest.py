"""A digest of a set of blocks that is cheap to keep: XOR of the first eight bytes of their hashes.

It does not depend on the order of changes, and each change costs one XOR. Publisher and index each
keep their own and compare: two sets of equal size that differ agree by chance once in 2**64.
"""

from __future__ import annotations

import functools
import operator

from xllm.kvcache.hashing import split_hashes

KEY_BYTES = 8


def hash_key(content: bytes) -> int:
    """The first eight bytes of a hash as a number, little-endian, never 0."""
    return int.from_bytes(content[:KEY_BYTES], "little") or 1


def digest_of(hashes: bytes) -> int:
    """The digest of a set, from its concatenated hashes."""
    return functools.reduce(operator.xor, map(hash_key, split_hashes(hashes)), 0)
