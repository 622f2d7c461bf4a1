"""The compiled search for the words of a text, loaded with ctypes.

Its twins are the patterns of `word_borders`, which stand in where the library was not compiled.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import structlog

from xllm.protocol.native.opening import open_library

_log = structlog.get_logger("native")
_ABI = 1
"""kAbi of words.cpp."""
MAX_BYTES = (1 << 30) - 1
"""Of a text: numbers have 32 bits there."""
GPT2, LETTERS_FIRST = 1, 2
"""Rules: the patterns of these names in `word_borders`."""


class NativeWords:
    """`path`: the library. OSError or AttributeError where it is not what it should be."""

    def __init__(self, path: Path) -> None:
        library = ctypes.PyDLL(str(path))
        found = library.xt_abi()
        if found != _ABI:
            raise OSError(f"{path.name} is of version {found}, not {_ABI}: build it again")
        # Without types for its arguments: bytes, and numbers of 32 bits.
        self._part_words = library.xt_part_words

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


@functools.cache
def load() -> NativeWords | None:
    """The library beside this file; None, and a line in the log, where none can be used."""
    found = open_library(Path(__file__).parent, "_words", NativeWords)
    if isinstance(found, NativeWords):
        return found
    _log.warning("words_in_python", reason=found)
    return None
