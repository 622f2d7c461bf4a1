"""What the index keeps of content hashes, many at once: `digest.hash_key` in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xllm.errors import InvalidRequestError
from xllm.kvcache.digest import KEY_BYTES
from xllm.kvcache.hashing import HASH_BYTES

Words = npt.NDArray[np.uint64]
_ONE = np.uint64(1)


def hash_keys(hashes: bytes, param: str = "hashes") -> Words:
    """`hash_key` of each of concatenated hashes; errors as in `first_words`."""
    return np.maximum(first_words(hashes, param), _ONE)


def table_keys(words: Words, multiplier: np.uint64) -> Words:
    """Where the table has the blocks whose hashes begin with these words: `hash_keys` times the
    index's secret."""
    keys = np.maximum(words, _ONE)
    keys *= multiplier
    return keys


def first_words(hashes: bytes, param: str = "hashes") -> Words:
    """The first eight bytes of each of concatenated hashes, not copied. InvalidRequestError naming
    `param` where the length is no multiple of a hash's."""
    if len(hashes) % HASH_BYTES:
        raise InvalidRequestError(
            f"{len(hashes)} bytes of {param} are no multiple of {HASH_BYTES}", param=param
        )
    words: Words = np.frombuffer(hashes, "<u8")[:: HASH_BYTES // KEY_BYTES]
    return words
