"""The compiled search for the words of a text and for their token ids, loaded with ctypes.

Its twins are the patterns of `word_borders` and `PatternTable`, which stand in where the library
was not compiled. Every call keeps the interpreter, so that no two threads are in a table.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Mapping
from pathlib import Path

import structlog

from xllm.protocol.native.opening import open_library

_log = structlog.get_logger("native")
_ABI = 3
"""kAbi of words.cpp."""
MAX_BYTES = (1 << 30) - 1
"""Of a text: numbers have 32 bits there."""
KEPT_BYTES = 252
"""Of a word, and of its ids: of longer ones nothing is kept (kMaxBytes of table.h)."""
LOOK_BYTES = 1 << 15
"""Of a text that are looked at before other threads may have the interpreter: about 0.3 ms."""
GPT2, LETTERS_FIRST = 1, 2
"""Rules: the patterns of these names in `word_borders`."""
_ID_BYTES = 4
_UNKNOWN_BYTES = 12
"""Of `Unknown` in words.cpp: three numbers."""
_SECRET = int.from_bytes(os.urandom(8), "little")
"""Of the tables: who does not know it cannot make words that are slow to find."""


class NativeWords:
    """`path`: the library. OSError or AttributeError where it is not what it should be."""

    def __init__(self, path: Path) -> None:
        library = ctypes.PyDLL(str(path))
        found = library.xt_abi()
        if found != _ABI:
            raise OSError(f"{path.name} is of version {found}, not {_ABI}: build it again")
        # Without types for their arguments: bytes, pointers, and numbers of 32 bits.
        self._part_words = library.xt_part_words
        self.look, self.keep = library.xt_look, library.xt_keep
        self.new_table, self.free_table = library.xt_new_table, library.xt_free_table
        self.table_bytes = library.xt_table_bytes
        self.new_table.restype = ctypes.c_void_p
        self.table_bytes.restype = ctypes.c_int64

    def split(self, text: str, rule: int) -> list[str]:
        """The words of a text by GPT2 or LETTERS_FIRST. ValueError (a UnicodeEncodeError, too) for
        a text with a NUL, which is put between words here, and for one that is not Unicode."""
        if "\0" in text:
            raise ValueError("a text with a NUL")
        data = text.encode()
        if not data:
            return []
        if len(data) > MAX_BYTES:
            raise ValueError(f"a text of {len(data)} bytes")
        parted = bytes(2 * len(data))  # written before anybody else has it
        size = self._part_words(data, len(data), rule, parted)
        # All words in one call: slices of the text would take most of the time.
        return parted[:size].decode().split("\0")


class NativeTable:
    """See WordTable. `rule`: GPT2 or LETTERS_FIRST."""

    def __init__(self, library: NativeWords, rule: int) -> None:
        self._library = library
        self._rule = rule
        self._table = ctypes.c_void_p(library.new_table(ctypes.c_uint64(_SECRET)))

    def __del__(self) -> None:
        self._library.free_table(self._table)

    @property
    def num_bytes(self) -> int:
        """See WordTable."""
        num_bytes: int = self._library.table_bytes(self._table)
        return num_bytes

    def look(self, text: str, older: NativeTable | None) -> list[bytes | str]:
        """See WordTable."""
        data = text.encode()
        if len(data) > MAX_BYTES:
            return [text]
        row: list[bytes | str] = []
        start = 0
        while start < len(data):
            start = self._look_on(data, start, older, row)
        return row

    def _look_on(
        self, data: bytes, start: int, older: NativeTable | None, row: list[bytes | str]
    ) -> int:
        """Look at some words more; where the next one begins."""
        size = len(data)
        stop = min(size, start + LOOK_BYTES)
        ids = bytes(_ID_BYTES * (stop - start) + KEPT_BYTES)
        unknown = bytes(_UNKNOWN_BYTES * (stop - start + 1))
        others = None if older is None else older._table
        rule, call = self._rule, self._library.look
        num_unknown = call(self._table, others, data, size, start, stop, rule, ids, unknown)
        places = array("i", unknown[: _UNKNOWN_BYTES * (num_unknown + 1)])
        behind = end = 0
        for begin, end, ids_bytes in zip(*[iter(places)] * 3, strict=True):
            if ids_bytes > behind:
                row.append(ids[behind:ids_bytes])
                behind = ids_bytes
            if end > begin:
                row.append(data[begin:end].decode())
        return end

    def keep(self, words: Mapping[str, bytes]) -> None:
        """See WordTable."""
        pairs = [(word.encode(), ids) for word, ids in words.items() if len(word) <= KEPT_BYTES]
        sizes = array("i")
        for name, ids in pairs:
            sizes.append(len(name))
            sizes.append(len(ids))
        names, packed = b"".join([one for one, _ in pairs]), b"".join([one for _, one in pairs])
        self._library.keep(self._table, names, packed, sizes.tobytes(), len(pairs))


@functools.cache
def load() -> NativeWords | None:
    """The library beside this file; None, and a line in the log, where none can be used."""
    found = open_library(Path(__file__).parent, "_words", NativeWords)
    if isinstance(found, NativeWords):
        return found
    _log.warning("words_in_python", reason=found)
    return None
