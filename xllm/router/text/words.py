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
from itertools import islice
from typing import Protocol

from xllm.protocol.token_bytes import TOKEN_BYTES
from xllm.router.text.word_table import WordTable

VOCABULARY_BYTES = 1280
"""What a tenant costs beside its words, about."""
TURN_OVER = 5
"""One tenant's words turn over at one part in so many of the room: a table that grows doubles, and
there are two."""
AT_ONCE = 256
"""Words that are encoded by one call, and kept: the tokenizer's library holds the interpreter while
it reads and hands over."""


class _Vocabulary:
    """Of one tenant: words since the last turn-over, and those of the time before that."""

    __slots__ = ("counted", "older", "recent")

    def __init__(self, recent: WordTable) -> None:
        self.recent = recent
        self.older: WordTable | None = None
        self.counted = 0
        """Bytes of it in the sum over all tenants."""

    @property
    def num_bytes(self) -> int:
        older = self.older
        return VOCABULARY_BYTES + self.recent.num_bytes + (older.num_bytes if older else 0)


class Encoder(Protocol):
    """Gives the ids of words, each by itself, as bytes (see token_bytes)."""

    def encode(self, words: Sequence[str]) -> Sequence[bytes]:
        """Of some words."""
        ...


class KnownWords:
    """Encodes by words. `make_table` makes the tables of them; `max_bytes`: of what is remembered,
    all tenants together."""

    def __init__(
        self, encoder: Encoder, make_table: Callable[[], WordTable], max_bytes: int
    ) -> None:
        self._encoder = encoder
        self._make_table = make_table
        self._max_bytes = max_bytes
        self._vocabularies: OrderedDict[bytes, _Vocabulary] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0
        """Of all words that are remembered, about."""
        self.num_tokens = 0
        """Tokens of all texts."""
        self.num_encoded = 0
        """Those that had to be encoded."""

    def pack(self, texts: Sequence[str], owner: bytes) -> list[bytes]:
        """The ids of each of some texts that begin and end where they may be cut. What nobody
        knows of all of them is encoded together, since a call costs as much as some words."""
        vocabulary = self._vocabulary(owner)
        recent, older = vocabulary.recent, vocabulary.older
        rows = [recent.look(text, older) for text in texts]
        learned: dict[str, bytes] = {}
        unknown = iter({part: None for row in rows for part in row if isinstance(part, str)})
        while some := list(islice(unknown, AT_ONCE)):
            new = dict(zip(some, self._encoder.encode(some), strict=True))
            self.num_encoded += sum(map(len, new.values())) // TOKEN_BYTES
            learned |= new
            self._keep(owner, vocabulary, new)
        if not learned:
            self._keep(owner, vocabulary, learned)  # what only `older` knew is in `recent`
        packed = [
            b"".join([learned[part] if isinstance(part, str) else part for part in row])
            for row in rows
        ]
        self.num_tokens += sum(map(len, packed)) // TOKEN_BYTES
        return packed

    def _vocabulary(self, owner: bytes) -> _Vocabulary:
        with self._lock:
            vocabulary = self._vocabularies.get(owner)
            if vocabulary is None:
                vocabulary = self._vocabularies[owner] = _Vocabulary(self._make_table())
                self._count(vocabulary)
            else:
                self._vocabularies.move_to_end(owner)
            return vocabulary

    def _keep(self, owner: bytes, vocabulary: _Vocabulary, learned: dict[str, bytes]) -> None:
        """Whoever has not asked for longest is forgotten first."""
        with self._lock:
            if self._vocabularies.get(owner) is not vocabulary:
                return  # forgotten meanwhile
            if learned:
                vocabulary.recent.keep(learned)
            if TURN_OVER * vocabulary.recent.num_bytes > self._max_bytes:
                vocabulary.older, vocabulary.recent = vocabulary.recent, self._make_table()
            self._count(vocabulary)

    def _count(self, vocabulary: _Vocabulary) -> None:
        num_bytes = vocabulary.num_bytes
        total = self.num_bytes + num_bytes - vocabulary.counted
        vocabulary.counted = num_bytes
        while total > self._max_bytes:
            _, gone = self._vocabularies.popitem(last=False)
            total -= gone.counted
        self.num_bytes = total
