"""Encodes words that nobody knows yet: many at once, since a call costs as much as some words."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from tokenizers import Tokenizer

from xllm.protocol.token_bytes import TOKEN_BYTES, pack_tokens

Split = Callable[[str], list[str]]


class _TokenLengths(dict[int, int]):
    """Bytes that each token of a byte-level tokenizer stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        super().__init__({one: len(added[one].content.encode()) for one in added})
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> int:
        token = self._tokenizer.id_to_token(token_id)
        assert token is not None, "the tokenizer itself named it"
        length = self[token_id] = len(token)  # a character for each byte
        return length


class WordEncoder:
    """Of a byte-level tokenizer. `split` finds the words of a text (see word_borders)."""

    def __init__(self, tokenizer: Tokenizer, split: Split) -> None:
        self._tokenizer = tokenizer
        self._split = split
        self._lengths = _TokenLengths(tokenizer)

    def encode(self, words: Sequence[str]) -> list[bytes]:
        """The ids of each word as bytes (see token_bytes)."""
        row = _row(words)
        text = "".join(row)
        together = None
        if len(row) > 1 and self._split(text) == row:
            together = self._encode_together(text, row)
        if together is None:
            return self._encode_apart(words)
        known = dict(zip(row, together, strict=True))
        others = [word for word in words if word not in known]
        known.update(zip(others, self._encode_apart(others), strict=True))
        return [known[word] for word in words]

    def _encode_apart(self, words: Sequence[str]) -> list[bytes]:
        if not words:
            return []
        encoded = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return [pack_tokens(one.ids) for one in encoded]

    def _encode_together(self, text: str, words: Sequence[str]) -> list[bytes] | None:
        """From the ids of their text; None where those cannot be told apart: bytes are changed by
        normalization, or a tokenizer leaves some out."""
        if not unicodedata.is_normalized("NFC", text):
            return None
        # The batch call skips the offsets of tokens in the text: a third of the time.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ends = list(accumulate(map(self._lengths.__getitem__, ids)))
        sizes = map(len, words) if text.isascii() else (len(word.encode()) for word in words)
        packed = pack_tokens(ids)
        parts: list[bytes] = []
        first = start = 0
        for size in sizes:
            start += size
            last = bisect_left(ends, start, first)
            if last == len(ends) or ends[last] != start:
                return None
            parts.append(packed[first * TOKEN_BYTES : (last + 1) * TOKEN_BYTES])
            first = last + 1
        return parts if first == len(ids) else None


def _row(words: Sequence[str]) -> list[str]:
    """As many of them as are words of what they make one after the other, as a rule: lines, one
    more, and those behind a space. Others would be parts of the word before them."""
    lines: list[str] = []
    spaced: list[str] = []
    one: list[str] = []
    for word in words:
        if word[0] == " ":
            spaced.append(word)
        elif word[0].isspace():
            continue
        elif word[-1] == "\n":
            lines.append(word)
        elif not one:
            one.append(word)
    return lines + one + spaced
