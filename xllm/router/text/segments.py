"""Encoding by segments, so that a conversation's next turn encodes only what is new.

Special tokens cut a text before anything else of the tokenizer sees it, so what stands between
two of them always gives the same ids, whatever surrounds it. That holds for byte-level tokenizers
that add no leading space and whose special tokens swallow no neighbouring space; for others there
is no encoder of this kind. Where words are known to be encoded apart (`word_borders`), a long
segment is cut further, and what is new is put together of words that were met before. Segments are
remembered for each tenant apart: what one asked must not show in another's times. Invariant: the
ids are those of the tokenizer for the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b

from tokenizers import Tokenizer

from xllm.protocol.token_bytes import TOKEN_BYTES, pack_tokens, unpack_tokens
from xllm.router.text.kept import KeptBytes
from xllm.router.text.word_borders import WordBorders, find_word_borders, state_of
from xllm.router.text.word_encoder import WordEncoder
from xllm.router.text.word_table import table_maker
from xllm.router.text.words import KnownWords

CHUNK_CHARS = 2048
"""Long segments are cut at the first place behind so many characters."""
NAMED_BY_TEXT = 128
"""Segments of more characters are kept under their hash."""
MAX_BYTES = 64 << 20
WORDS_SHARE = 4
"""One part in so many of what may be remembered is for words."""
_Name = tuple[bytes, str | bytes]


class SegmentEncoder:
    """Encodes without adding special tokens; those in the text are found. `borders`: where a
    segment may be cut, if that is known; `max_bytes`: of what is remembered."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_ids: dict[str, int],
        borders: WordBorders | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = {name: pack_tokens((special_ids[name],)) for name in special_ids}
        # Of those that begin at one place the longest wins, as in the tokenizer.
        names = sorted(special_ids, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._cut_word = borders.cut if borders is not None else None
        self.words: KnownWords | None = None
        """What knows the words of new segments, where those are encoded apart."""
        if borders is not None and max_bytes > 0:
            encoder = WordEncoder(tokenizer, borders.split)
            self.words = KnownWords(encoder, table_maker(borders), max_bytes // WORDS_SHARE)
            max_bytes -= max_bytes // WORDS_SHARE
        self.kept = KeptBytes(max_bytes)
        self.num_hits = 0
        """Segments that were found."""
        self.num_found = 0
        """Tokens of those."""
        self.num_encoded = 0
        """Tokens of segments that were not."""

    def encode(self, text: str, owner: bytes) -> list[int]:
        """Token ids; `owner` says whose segments may be used again."""
        return unpack_tokens(self.pack(text, owner)).tolist()

    def pack(self, text: str, owner: bytes) -> bytes:
        """The same as bytes."""
        parts: list[bytes | _Name] = []
        new: dict[_Name, str] = {}
        repeated: list[_Name] = []
        for piece, special in self._pieces(text):
            if special is not None:
                parts.append(special)
                continue
            name = (owner, piece if len(piece) <= NAMED_BY_TEXT else _digest(piece))
            packed = self.kept.get(name)
            if packed is not None:
                self._count_hit(packed)
            elif name in new:
                repeated.append(name)
            else:
                new[name] = piece
            parts.append(name if packed is None else packed)
        encoded = dict(zip(new, self._encode(list(new.values()), owner), strict=True))
        for name, packed in encoded.items():
            self.num_encoded += len(packed) // TOKEN_BYTES
            self.kept.put(name, packed)
        for name in repeated:
            self._count_hit(encoded[name])
        return b"".join([part if isinstance(part, bytes) else encoded[part] for part in parts])

    def _count_hit(self, packed: bytes) -> None:
        self.num_hits += 1
        self.num_found += len(packed) // TOKEN_BYTES

    def _pieces(self, text: str) -> Iterator[tuple[str, bytes | None]]:
        """What a text is made of: special tokens, with their ids, and what is between them, in
        chunks."""
        special = True
        for segment in self._cut.split(text) if self._cut is not None else (text,):
            special = not special
            if special:
                yield segment, self._special[segment]
            else:
                for chunk in self._chunks(segment):
                    yield chunk, None

    def _chunks(self, segment: str) -> Iterator[str]:
        """The pieces of a segment: cuts depend on what stands before them only, so that a segment
        that grows keeps them."""
        start = 0
        if self._cut_word is not None:
            while found := self._cut_word.search(segment, start + CHUNK_CHARS):
                yield segment[start : found.end()]
                start = found.end()
        if start < len(segment):
            yield segment[start:]

    def _encode(self, pieces: list[str], owner: bytes) -> list[bytes]:
        if not pieces:
            return []
        if self.words is not None:
            return self.words.pack(pieces, owner)
        return [self._encode_one(piece) for piece in pieces]

    def _encode_one(self, piece: str) -> bytes:
        # The batch call skips the offsets of tokens in the text: a third of the time.
        fast = self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)
        return pack_tokens(fast[0].ids)


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=32).digest()


def make_segment_encoder(tokenizer: Tokenizer, max_bytes: int = MAX_BYTES) -> SegmentEncoder | None:
    """The encoder of a byte-level tokenizer, or None where segments are not independent."""
    if '"add_prefix_space":true' in state_of(tokenizer.pre_tokenizer):
        return None
    if state_of(tokenizer.normalizer) not in ("", '{"type":"NFC"}'):
        return None
    special_ids = {}
    borders = find_word_borders(tokenizer)
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word:
            return None
        if any(map(str.isspace, token.content)):
            borders = None
        if not token.normalized:
            special_ids[token.content] = token_id
    return SegmentEncoder(tokenizer, special_ids, borders, max_bytes)
