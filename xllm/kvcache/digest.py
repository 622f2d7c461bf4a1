"""A digest of a set of blocks that is cheap to keep: XOR of the first eight bytes of their hashes.

It does not depend on the order of changes, and each change costs one XOR. Publisher and index each
keep their own and compare: two sets of equal size that differ agree by chance once in 2**64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xllm.errors import InvalidRequestError
from xllm.kvcache.hashing import HASH_BYTES

KEY_BYTES = 8


def hash_key(content: bytes) -> int:
    """The first eight bytes of a hash as a number, little-endian, never 0."""
    return int.from_bytes(content[:KEY_BYTES], "little") or 1


def hash_keys(hashes: bytes, param: str = "hashes") -> npt.NDArray[np.uint64]:
    """`hash_key` of each of concatenated hashes. InvalidRequestError naming `param` where the
    length is no multiple of a hash's."""
    if len(hashes) % HASH_BYTES:
        raise InvalidRequestError(
            f"{len(hashes)} bytes of {param} are no multiple of {HASH_BYTES}", param=param
        )
    words = np.frombuffer(hashes, "<u8")[:: HASH_BYTES // KEY_BYTES]
    keys: npt.NDArray[np.uint64] = np.maximum(words, np.uint64(1)).astype(np.uint64, copy=False)
    return keys


def digest_of(hashes: bytes) -> int:
    """The digest of a set, from its concatenated hashes."""
    return int(np.bitwise_xor.reduce(hash_keys(hashes), initial=0))
