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
MAX_PENDING = 16
"""More tokens than any character has: what has not become one by then never will."""


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
        self._decoder: codecs.IncrementalDecoder | None = None
        """Made where a character is cut for the first time: most texts need none."""
        self._strip = strip_start

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        data = b"".join(map(self._pieces.__getitem__, token_ids))
        if self._strip and data:
            data = self._begin(data, token_ids)
        if self._decoder is None:
            try:
                return data.decode()
            except UnicodeDecodeError:
                self._decoder = _make_decoder("replace")
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
        return "" if self._decoder is None else self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any decoder: decodes a short window of tokens with and without the new one, and says
    what was added. The window starts where text was last said, so that a decoder which joins by
    neighbours sees them. After `MAX_PENDING` tokens without a sure character the text is said as
    it is: the work for a token is bounded."""

    __slots__ = ("_before", "_ids", "_read", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._read = 0
        """Tokens at the window's begin whose text was said."""
        self._before = ""
        """Their text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        said = []
        for token_id in token_ids:
            ids = self._ids
            ids.append(token_id)
            now = self._decode(ids)
            is_sure = len(now) > len(self._before) and not now.endswith(_REPLACEMENT)
            if is_sure or len(ids) - self._read >= MAX_PENDING:
                said.append(now[len(self._before) :])
                del ids[: self._read]
                self._read = len(ids)
                self._before = self._decode(ids)
        return "".join(said)

    def finish(self) -> str:
        """What was held back."""
        text = self._decode(self._ids)[len(self._before) :]
        self._ids.clear()
        self._read = 0
        self._before = ""
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text
