"""Encodes words that nobody knows yet: many at once, since a call costs as much as some words."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from tokenizers import Tokenizer

from xllm.protocol.token_bytes import TOKEN_BYTES, pack_tokens


class _TokenLengths(dict[int, int]):
    """Bytes that each token of a byte-level tokenizer stands for in a text of ASCII."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> int:
        # A character for each byte; an added token stands for itself.
        token = self._tokenizer.id_to_token(token_id)
        assert token is not None, "the tokenizer itself named it"
        length = self[token_id] = len(token)
        return length


class WordEncoder:
    """Of a byte-level tokenizer. `words` finds the words of a text (see word_borders)."""

    def __init__(self, tokenizer: Tokenizer, words: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self._split = words.findall
        self._lengths = _TokenLengths(tokenizer)

    def encode(self, words: Sequence[str]) -> list[bytes]:
        """The ids of each word as bytes (see token_bytes)."""
        # Those that begin a line would be parts of the word before them, in a row.
        plain = [word for word in words if word[0] == " " and word.isascii()]
        together = self._encode_together(plain)
        if together is None:
            return [pack_tokens(self._ids(word)) for word in words]
        known = dict(zip(plain, together, strict=True))
        # A dictionary's `get` would encode those that it has, too.
        return [known[one] if one in known else pack_tokens(self._ids(one)) for one in words]

    def _encode_together(self, words: list[str]) -> list[bytes] | None:
        """The same of words of ASCII, from their ids in a row; None where those cannot be told
        apart: in a row they may be other words, and a tokenizer may leave bytes out."""
        text = "".join(words)
        if len(words) < 2 or self._split(text) != words:
            return None
        ids = self._ids(text)
        ends = list(accumulate(map(self._lengths.__getitem__, ids)))
        if ends[-1] != len(text):
            return None
        packed = pack_tokens(ids)
        parts: list[bytes] = []
        first = start = 0
        for word in words:
            start += len(word)
            last = bisect_left(ends, start, first)
            assert ends[last] == start, "a token goes over the border of a word"
            parts.append(packed[first * TOKEN_BYTES : (last + 1) * TOKEN_BYTES])
            first = last + 1
        return parts

    def _ids(self, text: str) -> list[int]:
        # The batch call skips the offsets of tokens in the text: a third of the time.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids
