"""Tables of words and their token ids: what the compiled ones and those in Python do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from sys import getsizeof
from typing import Protocol, Self

from xllm.router.text.native.words import NativeTable, load
from xllm.router.text.word_borders import WordBorders

WORD_BYTES = 320
"""What a word costs a PatternTable at most: its name, its ids, its place."""
PLACE_BYTES = 140
"""Of these, what does not depend on the word."""


class WordTable(Protocol):
    """Words by one rule and their ids as bytes (see token_bytes)."""

    @property
    def num_bytes(self) -> int:
        """What it costs, about."""
        ...

    def look(self, text: str, older: Self | None) -> list[bytes | str]:
        """A text that begins and ends where it may be cut: the ids of words that are known, and
        the other words themselves, in a row. What only `older` knows is kept here, too."""
        ...

    def keep(self, words: Mapping[str, bytes]) -> None:
        """Words and their ids; long ones are left out, since they hardly come again."""
        ...


class PatternTable:
    """See WordTable. `split` finds the words of a text."""

    def __init__(self, split: Callable[[str], list[str]]) -> None:
        self._split = split
        self._known: dict[str, bytes] = {}

    @property
    def num_bytes(self) -> int:
        """See WordTable."""
        return WORD_BYTES * len(self._known)

    def look(self, text: str, older: PatternTable | None) -> list[bytes | str]:
        """See WordTable."""
        words = self._split(text)
        # One pass without a branch: most words are known.
        found = list(map(self._known.get, words))
        if older is not None and None in found:
            others = older._known
            missing = (word for word, ids in zip(words, found, strict=True) if ids is None)
            self._known.update({word: others[word] for word in missing if word in others})
            found = list(map(self._known.get, words))
        pairs = zip(words, found, strict=True)
        return [word if ids is None else ids for word, ids in pairs]

    def keep(self, words: Mapping[str, bytes]) -> None:
        """See WordTable."""
        for word, packed in words.items():
            if getsizeof(word) + len(packed) <= WORD_BYTES - PLACE_BYTES:
                self._known[word] = packed


def table_maker(borders: WordBorders) -> Callable[[], WordTable]:
    """What makes empty tables of the words between such borders."""
    library = load()
    if library is None:
        return lambda: PatternTable(borders.words.findall)
    return lambda: NativeTable(library, borders.rule)
