"""Encoding by segments, so that a conversation's next turn encodes only what is new.

Special tokens cut a text before anything else of the tokenizer sees it, so what stands between
two of them always gives the same ids, whatever surrounds it. That holds for byte-level tokenizers
that add no leading space and whose special tokens swallow no neighbouring space; for others there
is no encoder of this kind. Segments are remembered for each tenant apart: what one asked must not
show in another's times. Invariant: the ids are those of the tokenizer for the whole text.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

MIN_CHARS = 8
MAX_CHARS = 2048
MAX_SEGMENTS = 1024
"""Of each of the two generations that are kept."""


class SegmentEncoder:
    """Encodes without adding special tokens; those in the text are found."""

    def __init__(self, tokenizer: Tokenizer, special_ids: dict[str, int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        # Of those that begin at one place the longest wins, as in the tokenizer.
        names = sorted(special_ids, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._young: dict[tuple[bytes, str], list[int]] = {}
        self._old: dict[tuple[bytes, str], list[int]] = {}
        self.num_hits = 0

    def encode(self, text: str, owner: bytes) -> list[int]:
        """Token ids; `owner` says whose segments may be used again."""
        if self._cut is None:
            return list(self._segment(text, owner))
        ids: list[int] = []
        for number, piece in enumerate(self._cut.split(text)):
            if number % 2:
                ids.append(self._special_ids[piece])
            elif piece:
                ids += self._segment(piece, owner)
        return ids

    def _segment(self, text: str, owner: bytes) -> list[int]:
        if not MIN_CHARS <= len(text) <= MAX_CHARS:
            return self._encode(text)
        key = (owner, text)
        ids = self._young.get(key)
        if ids is None:
            ids = self._old.get(key)
            if ids is None:
                ids = self._encode(text)
                self.num_hits -= 1
            if len(self._young) >= MAX_SEGMENTS:
                self._old, self._young = self._young, {}
            self._young[key] = ids
        self.num_hits += 1
        return ids

    def _encode(self, text: str) -> list[int]:
        # The batch call skips the offsets of tokens in the text: a third of the time.
        fast = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = fast[0].ids
        return ids


def make_segment_encoder(tokenizer: Tokenizer) -> SegmentEncoder | None:
    """The encoder of a byte-level tokenizer, or None where segments are not independent."""
    if '"add_prefix_space":true' in _state(tokenizer.pre_tokenizer):
        return None
    if _state(tokenizer.normalizer) not in ("", '{"type":"NFC"}'):
        return None
    special_ids = {}
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word:
            return None
        if not token.normalized:
            special_ids[token.content] = token_id
    return SegmentEncoder(tokenizer, special_ids)


def _state(part: object) -> str:
    """A part of the tokenizer as JSON without spaces; empty where there is none."""
    if part is None:
        return ""
    state = part.__getstate__()
    assert isinstance(state, bytes)
    return state.decode().replace(" ", "")
