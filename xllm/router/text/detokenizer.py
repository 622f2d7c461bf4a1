"""Token ids to text, a few at a time: nothing is said that a later token could change.

An incomplete UTF-8 sequence is held back; U+FFFD stands only where bytes can no longer become
text. Invariant: the joined results of `feed` and one last `finish` are the same for any split of
the ids into calls.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from xllm.router.text.pieces import PieceTable

_make_decoder = codecs.getincrementaldecoder("utf-8")
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns the tokens of one choice into text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character."""
        ...


class PieceDetokenizer:
    """For tokenizers whose tokens are bytes: joins and reads them (about 0.1 us a token)."""

    __slots__ = ("_decoder", "_pieces", "_strip")

    def __init__(self, pieces: PieceTable, strip_start: int = 0) -> None:
        self._pieces = pieces
        self._decoder = _make_decoder("replace")
        self._strip = strip_start

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        data = b"".join(map(self._pieces.__getitem__, token_ids))
        if self._strip and data:
            data = self._begin(data, token_ids)
        return self._decoder.decode(data)

    def _begin(self, data: bytes, token_ids: Sequence[int]) -> bytes:
        """The first bytes of the text, less the spaces that the tokenizer's decoder strips."""
        first = next(piece for token_id in token_ids if (piece := self._pieces[token_id]))
        num_spaces = len(first) - len(first.lstrip(b" "))
        num_spaces = num_spaces if self._strip < 0 else min(num_spaces, self._strip)
        self._strip = 0
        return data[num_spaces:]

    def finish(self) -> str:
        """What was held back."""
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any decoder: decodes a short window of tokens with and without the new one, and says
    what was added. The window starts where text was last said, so that a decoder which joins by
    neighbours sees them."""

    __slots__ = ("_ids", "_prefix", "_read", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        said = []
        for token_id in token_ids:
            self._ids.append(token_id)
            before = self._decode(self._prefix, self._read)
            now = self._decode(self._prefix, len(self._ids))
            if len(now) > len(before) and not now.endswith(_REPLACEMENT):
                said.append(now[len(before) :])
                self._prefix, self._read = self._read, len(self._ids)
                del self._ids[: self._prefix]
                self._read -= self._prefix
                self._prefix = 0
        return "".join(said)

    def finish(self) -> str:
        """What was held back."""
        before = self._decode(self._prefix, self._read)
        text = self._decode(self._prefix, len(self._ids))[len(before) :]
        self._ids.clear()
        self._prefix = self._read = 0
        return text

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=self._skip)
        return text
