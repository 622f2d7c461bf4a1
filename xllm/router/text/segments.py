"""Encoding by segments, so that a conversation's next turn encodes only what is new.

Special tokens cut a text before anything else of the tokenizer sees it, so what stands between
two of them always gives the same ids, whatever surrounds it. That holds for byte-level tokenizers
that add no leading space and whose special tokens swallow no neighbouring space; for others there
is no encoder of this kind. A long segment is cut further where its words are known to be encoded
apart (`find_word_cut`). Segments are remembered for each tenant apart: what one asked must not
show in another's times. Invariant: the ids are those of the tokenizer for the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256

from tokenizers import Tokenizer

from xllm.protocol.token_bytes import TOKEN_BYTES, pack_tokens, unpack_tokens
from xllm.router.text.kept import KeptBytes

CHUNK_CHARS = 2048
"""Long segments are cut at the first place behind so many characters."""
NAMED_BY_TEXT = 128
"""Segments of more characters are kept under their hash."""
MAX_BYTES = 64 << 20

_WORD_CUT = re.compile(r"\S(?= )")
_LETTERS_FIRST = re.compile(
    re.escape(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}")
    + r"(\{1,[23]\})?"
    + re.escape(r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
)
"""The pattern of cl100k, Llama 3 and Qwen."""


class SegmentEncoder:
    """Encodes without adding special tokens; those in the text are found. `word_cut` finds places
    where a segment may be cut, if there are any; `max_bytes`: of what is remembered."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_ids: dict[str, int],
        word_cut: re.Pattern[str] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = {name: pack_tokens((special_ids[name],)) for name in special_ids}
        # Of those that begin at one place the longest wins, as in the tokenizer.
        names = sorted(special_ids, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._word_cut = word_cut
        self.kept = KeptBytes(max_bytes)
        self.num_hits = 0
        """Segments that were found."""
        self.num_found = 0
        """Tokens of those."""
        self.num_encoded = 0
        """Tokens that had to be encoded."""

    def encode(self, text: str, owner: bytes) -> list[int]:
        """Token ids; `owner` says whose segments may be used again."""
        return unpack_tokens(self.pack(text, owner)).tolist()

    def pack(self, text: str, owner: bytes) -> bytes:
        """The same as bytes."""
        if self._cut is None:
            return b"".join([self._chunk(one, owner) for one in self._chunks(text)])
        parts: list[bytes] = []
        special = True
        for piece in self._cut.split(text):
            special = not special
            if special:
                parts.append(self._special[piece])
            elif len(piece) > CHUNK_CHARS:
                parts += [self._chunk(one, owner) for one in self._chunks(piece)]
            elif piece:
                parts.append(self._chunk(piece, owner))
        return b"".join(parts)

    def _chunks(self, segment: str) -> Iterator[str]:
        """The pieces of a segment: cuts depend on what stands before them only, so that a segment
        that grows keeps them."""
        start = 0
        if self._word_cut is not None:
            while found := self._word_cut.search(segment, start + CHUNK_CHARS):
                yield segment[start : found.end()]
                start = found.end()
        if start < len(segment):
            yield segment[start:]

    def _chunk(self, text: str, owner: bytes) -> bytes:
        name: tuple[bytes, str | bytes] = (owner, text)
        if len(text) > NAMED_BY_TEXT:
            name = (owner, sha256(text.encode()).digest())
        packed = self.kept.get(name)
        if packed is not None:
            self.num_hits += 1
            self.num_found += len(packed) // TOKEN_BYTES
            return packed
        # The batch call skips the offsets of tokens in the text: a third of the time.
        fast = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        packed = pack_tokens(fast[0].ids)
        self.num_encoded += len(packed) // TOKEN_BYTES
        self.kept.put(name, packed)
        return packed


def make_segment_encoder(tokenizer: Tokenizer, max_bytes: int = MAX_BYTES) -> SegmentEncoder | None:
    """The encoder of a byte-level tokenizer, or None where segments are not independent."""
    if '"add_prefix_space":true' in _state(tokenizer.pre_tokenizer):
        return None
    if _state(tokenizer.normalizer) not in ("", '{"type":"NFC"}'):
        return None
    special_ids = {}
    others = []
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word:
            return None
        if token.normalized:
            others.append(token.content)
        else:
            special_ids[token.content] = token_id
    word_cut = find_word_cut(tokenizer)
    if any(" " in name for name in others):
        word_cut = None
    return SegmentEncoder(tokenizer, special_ids, word_cut, max_bytes)


def find_word_cut(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Where a text between special tokens may be cut without changing its ids, or None.

    Byte-level BPE merges within words only. In the patterns known here (GPT-2's, which is
    ByteLevel's own, and that of cl100k, Llama 3 and Qwen) nothing takes a space behind anything
    but a space, and only `\\s+(?!\\S)`, which ends in a space, looks ahead: so a word begins at
    each space behind a character that is none, and what stands before it does not matter."""
    state = json.loads(_state(tokenizer.pre_tokenizer) or "{}")
    if state.get("type") == "ByteLevel":
        return _WORD_CUT if state.get("use_regex") else None
    parts = state.get("pretokenizers", []) if state.get("type") == "Sequence" else []
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, level = parts
    pattern = split.get("pattern", {}).get("Regex", "")
    known = split.get("behavior") == "Isolated" and not split.get("invert")
    known = known and not level.get("use_regex")
    return _WORD_CUT if known and _LETTERS_FIRST.fullmatch(pattern) else None


def _state(part: object) -> str:
    """A part of the tokenizer as JSON without spaces; empty where there is none."""
    if part is None:
        return ""
    state = part.__getstate__()
    assert isinstance(state, bytes)
    return json.dumps(json.loads(state), separators=(",", ":"))
