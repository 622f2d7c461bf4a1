"""Words whose token ids are known: a text is mostly made of words that were encoded before.

For tokenizers that encode what stands between two word cuts apart (see `word_borders`),
so that a text's ids are those of its words in a row. Words are remembered for each tenant apart,
like texts. Invariant: a word's ids follow from the word alone, so an entry that one thread loses
to another costs time only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import Protocol

from xllm.protocol.token_bytes import TOKEN_BYTES

WORD_BYTES = 320
"""What a word costs at most: its name, its ids, its place in the table."""
PLACE_BYTES = 140
"""Of these, what does not depend on the word."""
VOCABULARY_WORDS = 4
"""What a tenant costs beside its words, in words."""

Known = dict[str, bytes]


class _Vocabulary:
    """Of one tenant: words since the last turn-over, and those of the time before that were not
    met since."""

    __slots__ = ("counted", "older", "recent")

    def __init__(self) -> None:
        self.recent: Known = {}
        self.older: Known = {}
        self.counted = 0
        """Words of it in the sum over all tenants."""

    def __len__(self) -> int:
        return VOCABULARY_WORDS + len(self.recent) + len(self.older)

    def keep(self, word: str, packed: bytes) -> None:
        """Longer ones hardly come again."""
        if getsizeof(word) + len(packed) <= WORD_BYTES - PLACE_BYTES:
            self.recent[word] = packed


class Encoder(Protocol):
    """Gives the ids of words, each by itself, as bytes (see token_bytes)."""

    def encode(self, words: Sequence[str]) -> Sequence[bytes]:
        """Of some words."""
        ...

    def encode_row(self, text: str, words: Sequence[str]) -> Sequence[bytes]:
        """Of all words of a text."""
        ...


class KnownWords:
    """Encodes by words. `split` finds the words of a text; `max_bytes`: of what is remembered, all
    tenants together."""

    def __init__(self, encoder: Encoder, split: Callable[[str], list[str]], max_bytes: int) -> None:
        self._encoder = encoder
        self._split = split
        self._max_words = max_bytes // WORD_BYTES
        self._vocabularies: OrderedDict[bytes, _Vocabulary] = OrderedDict()
        self._num_words = 0
        self._lock = threading.Lock()
        self.num_tokens = 0
        """Tokens of all texts."""
        self.num_encoded = 0
        """Those that had to be encoded."""

    @property
    def num_bytes(self) -> int:
        """Of all words that are remembered, about."""
        return WORD_BYTES * self._num_words

    def pack(self, text: str, owner: bytes) -> bytes:
        """The ids of a text that begins and ends where it may be cut."""
        words = self._split(text)
        vocabulary = self._vocabulary(owner)
        # One pass without a branch: most words are known.
        found: list[bytes | None] = list(map(vocabulary.recent.get, words))
        if None in found:
            missing = [word for word, packed in zip(words, found, strict=True) if packed is None]
            older = vocabulary.older  # another thread may put another in its place
            learned = {word: older[word] for word in missing if word in older}
            unknown = [word for word in dict.fromkeys(missing) if word not in learned]
            # A whole text is encoded faster than half of its words.
            if 2 * len(unknown) > len(words):
                unknown = words
                encoded = self._encoder.encode_row(text, words)
            else:
                encoded = self._encoder.encode(unknown)
            self.num_encoded += sum(map(len, encoded)) // TOKEN_BYTES
            learned.update(zip(unknown, encoded, strict=True))
            for word, packed in learned.items():
                vocabulary.keep(word, packed)
            self._make_room(owner, vocabulary)
            pairs = zip(words, found, strict=True)
            whole = b"".join(
                [learned[word] if packed is None else packed for word, packed in pairs]
            )
        else:
            whole = b"".join(found)  # type: ignore[arg-type]  # none is None
        self.num_tokens += len(whole) // TOKEN_BYTES
        return whole

    def _vocabulary(self, owner: bytes) -> _Vocabulary:
        with self._lock:
            vocabulary = self._vocabularies.get(owner)
            if vocabulary is None:
                vocabulary = self._vocabularies[owner] = _Vocabulary()
                self._count(vocabulary)
            else:
                self._vocabularies.move_to_end(owner)
            return vocabulary

    def _make_room(self, owner: bytes, vocabulary: _Vocabulary) -> None:
        """One tenant's words turn over at two fifths of the room; whoever has not asked for
        longest is forgotten first."""
        with self._lock:
            if self._vocabularies.get(owner) is not vocabulary:
                return  # forgotten meanwhile
            if 5 * len(vocabulary.recent) > 2 * self._max_words:
                vocabulary.older, vocabulary.recent = vocabulary.recent, {}
            self._count(vocabulary)

    def _count(self, vocabulary: _Vocabulary) -> None:
        self._num_words += len(vocabulary) - vocabulary.counted
        vocabulary.counted = len(vocabulary)
        while self._num_words > self._max_words:
            _, gone = self._vocabularies.popitem(last=False)
            self._num_words -= gone.counted
