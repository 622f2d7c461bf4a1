"""What the index keeps of content hashes, many at once: `digest.hash_key` in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xllm.errors import InvalidRequestError
from xllm.kvcache.digest import KEY_BYTES
from xllm.kvcache.hashing import HASH_BYTES


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
