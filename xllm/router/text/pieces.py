"""The bytes that each token id stands for, as the tokenizer's own decoder has it.

Byte-level decoders, and SentencePiece ones with byte fallback, decode token by token: the text is
the UTF-8 reading of the joined bytes, less one leading space at the very beginning for the latter.
Any other decoder has no table, and `build_pieces` says so. Invariant: for valid UTF-8, joining
the pieces gives what `tokenizers` gives for the same ids. (For invalid bytes the byte fallback of
`tokenizers` turns the whole run of byte tokens into U+FFFD, which no stream can know ahead; ours
replaces only what is invalid.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

_SPACE_MARK = "▁"


class PieceTable(dict[int, bytes]):
    """Token id to bytes, filled on first use: `table[id]` never fails, unknown ids are empty."""

    def __init__(self, tokenizer: Tokenizer, scheme: PieceScheme, hidden: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._scheme = scheme
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        piece = b"" if token is None or token_id in self._hidden else self._scheme.piece(token)
        self[token_id] = piece
        return piece


class PieceScheme:
    """How a token's name becomes bytes."""

    strip_start = 0
    """Spaces dropped where a text begins: none, one, or (-1) all that begin the first token."""

    def piece(self, token: str) -> bytes:
        """The bytes of the token of that name."""
        raise NotImplementedError


class ByteLevelScheme(PieceScheme):
    """GPT-2's: each character of a token's name is a byte; a name with others is its own text."""

    def __init__(self) -> None:
        self._bytes = byte_alphabet()

    def piece(self, token: str) -> bytes:
        """The bytes of the token of that name."""
        try:
            return bytes(map(self._bytes.__getitem__, token))
        except KeyError:
            return token.encode()


class SentencePieceScheme(PieceScheme):
    """Spaces are marked; `<0xE2>` names a byte where the decoder has byte fallback."""

    def __init__(self, mark: str, byte_fallback: bool, strip_start: int) -> None:
        self._mark = mark
        self._byte_fallback = byte_fallback
        self.strip_start = strip_start

    def piece(self, token: str) -> bytes:
        """The bytes of the token of that name."""
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            try:
                return bytes((int(token[3:5], 16),))
            except ValueError:
                pass  # a token that only looks like a byte
        return token.replace(self._mark, " ").encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed (Radford et al. 2019, byte-level BPE)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    table = {chr(byte): byte for byte in shown}
    table.update({chr(0x100 + rank): byte for rank, byte in enumerate(hidden)})
    return table


def find_scheme(decoder: Mapping[str, Any] | None) -> PieceScheme | None:
    """The scheme of tokenizer.json's `decoder` entry; None: it does not work token by token."""
    if decoder is None:
        return None
    kind = decoder.get("type")
    if kind == "ByteLevel":
        return ByteLevelScheme()
    if kind == "Metaspace":
        scheme = decoder.get("prepend_scheme", "always")
        never = scheme == "never" or decoder.get("add_prefix_space") is False
        return SentencePieceScheme(
            decoder.get("replacement", _SPACE_MARK), False, 0 if never else -1
        )
    if kind == "Sequence":
        return _sequence_scheme(decoder.get("decoders", []))
    return None


def _sequence_scheme(decoders: list[Mapping[str, Any]]) -> PieceScheme | None:
    mark, byte_fallback, strip_start = "", False, 0
    for decoder in decoders:
        kind = decoder.get("type")
        if kind == "ByteLevel" and len(decoders) == 1:
            return ByteLevelScheme()
        if kind == "Replace" and decoder.get("content") == " " and not mark:
            pattern = decoder.get("pattern", {})
            mark = pattern.get("String", "") if isinstance(pattern, dict) else ""
            if not mark:
                return None
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Strip" and decoder.get("content") == " ":
            if decoder.get("start", 0) > 1 or decoder.get("stop", 0) > 0:
                return None
            strip_start = decoder.get("start", 0)
        elif kind != "Fuse":
            return None
    return SentencePieceScheme(mark, byte_fallback, strip_start) if mark else None
