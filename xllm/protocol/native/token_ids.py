"""The compiled loops over token ids, loaded with ctypes: found, checked, and called.

Each has a twin in Python, which stands in where the library was not compiled. SHA-256 itself is
that of the OpenSSL that Python's hashlib calls.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import structlog

from xllm.protocol.native.opening import open_library

_log = structlog.get_logger("native")
_ABI = 2
"""kAbi of token_ids.cpp."""
_DIGEST_BYTES = 32
_ID_BYTES = 4
RELEASE_FROM = 1 << 16
"""Bytes from which other threads of Python run meanwhile. For less than that, who gave the
interpreter away would wait longer for it than the work takes."""
MAX_BYTES = (1 << 31) - 1
"""Of token bytes that a call takes."""
_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_BYTES = ctypes.c_char_p


class NativeTokenIds:
    """`path`: the library. OSError or AttributeError where it, or the OpenSSL that it is to call,
    is not what it should be."""

    def __init__(self, path: Path) -> None:
        # The first keeps the interpreter, the second lets it go.
        self._holding = _with_signatures(ctypes.PyDLL(str(path)))
        self._releasing = _with_signatures(ctypes.CDLL(str(path)))
        found = self._holding.xt_abi()
        if found != _ABI:
            raise OSError(f"{path.name} is of version {found}, not {_ABI}: build it again")
        for library in (self._holding, self._releasing):
            library.xt_use_sha256(*_openssl_sha256())
        self._chain, self._largest = self._holding.xt_chain, self._holding.xt_largest
        root, block = bytes(range(_DIGEST_BYTES)), bytes(64)
        if self.chain(root, block, len(block)) != hashlib.sha256(root + block).digest():
            raise OSError("OpenSSL's SHA-256 gives another digest than hashlib's")

    def chain(self, root: bytes, packed: bytes, stride: int) -> bytes:
        """SHA-256 digests of the whole blocks of `stride` bytes in `packed`, each of the digest
        before it (`root` for the first) and its block; concatenated. ValueError for a root that is
        no digest, for blocks of nothing, and for more than MAX_BYTES."""
        size = len(packed)
        if len(root) != _DIGEST_BYTES or not 0 < stride <= MAX_BYTES or size > MAX_BYTES:
            # The library reads what is said to be there.
            raise ValueError(f"a root of {len(root)} bytes, {size} in blocks of {stride}")
        num_blocks = size // stride
        if not num_blocks:
            return b""
        chain = self._chain if size < RELEASE_FROM else self._releasing.xt_chain
        digests = bytes(num_blocks * _DIGEST_BYTES)  # written before anybody else has it
        if not chain(root, packed, num_blocks, stride, digests):
            raise OSError("OpenSSL refused to hash")
        return digests

    def largest(self, packed: bytes) -> int:
        """The largest of these ids; 0 of none. ValueError for more than MAX_BYTES."""
        size = len(packed)
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes of ids")
        found: int = self._largest(packed, size // _ID_BYTES)
        return found

    def read_ids(self, text: bytes) -> bytes | None:
        """Numbers below 2**32, as JSON writes them between the brackets of a list, as token bytes;
        None for any other text."""
        library = self._releasing if len(text) >= RELEASE_FROM else self._holding
        ids = bytearray(_ID_BYTES * library.xt_count_ids(text, len(text)))
        there = ctypes.byref(ctypes.c_char.from_buffer(ids))
        count = library.xt_read_ids(text, len(text), there)
        return None if count < 0 else bytes(ids)


@functools.cache
def load() -> NativeTokenIds | None:
    """The library beside this file; None, and a line in the log, where none can be used."""
    found = _find()
    if isinstance(found, NativeTokenIds):
        return found
    _log.warning("token_ids_in_python", reason=found)
    return None


def _find() -> NativeTokenIds | str:
    if sys.byteorder != "little":
        return "token bytes are little-endian, and this machine is not"
    return open_library(Path(__file__).parent, "_token_ids", NativeTokenIds)


def _openssl_sha256() -> tuple[Any, ...]:
    """OpenSSL's functions, found through Python's own module, which is linked with it.
    AttributeError where that keeps them to itself."""
    import _hashlib  # only CPython has it, and not every build

    openssl = ctypes.CDLL(_hashlib.__file__)
    functions = (openssl.SHA256_Init, openssl.SHA256_Update, openssl.SHA256_Final)
    return tuple(ctypes.cast(one, _POINTER) for one in functions)


def _with_signatures(library: Any) -> Any:
    """As token_ids.cpp has them. What each request calls gets none for its arguments, bytes and
    numbers of 32 bits, which ctypes passes by itself in a third of the time."""
    library.xt_abi.restype, library.xt_abi.argtypes = _I32, []
    library.xt_use_sha256.restype = None
    library.xt_use_sha256.argtypes = [_POINTER, _POINTER, _POINTER]
    library.xt_chain.restype = _I32
    library.xt_largest.restype = ctypes.c_uint32
    library.xt_count_ids.restype, library.xt_count_ids.argtypes = _I64, [_BYTES, _I64]
    library.xt_read_ids.restype, library.xt_read_ids.argtypes = _I64, [_BYTES, _I64, _POINTER]
    return library
