"""Where a tokenizer encodes what stands before and behind a place as if each stood alone.

Byte-level BPE merges within the words of its pattern only, so a border of two words that is found
whatever surrounds it is such a place. Two patterns are known here.

- GPT-2's, which is ByteLevel's own, and that of cl100k, Llama 3 and Qwen: nothing takes a space
  behind anything but a space, and only `\\s+(?!\\S)`, which ends in a space, looks ahead. So a word
  begins at each space behind what is no whitespace. A newline alone between two words belongs to
  the first or to neither.
- The latter's `\\s*[\\r\\n]+` takes whitespace up to its last newline, where it does not belong to
  the signs before it. So a word ends at the last newline of whitespace.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from tokenizers import Tokenizer

from xllm.router.text.native.words import GPT2, LETTERS_FIRST, load

_SPACE = re.compile(r"\S(?= )")
_LETTERS_FIRST = re.compile(
    re.escape(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}")
    + r"(\{1,[23]\})?"
    + re.escape(r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
)
"""The pattern of cl100k, Llama 3 and Qwen."""


class WordBorders(NamedTuple):
    """Ways to find such places. `cut` matches the character before one; `words` finds all that
    stands between them: what it finds is the whole text. `rule`: its compiled twin."""

    cut: re.Pattern[str]
    words: re.Pattern[str]
    rule: int

    def split(self, text: str) -> list[str]:
        """What `words` finds in a text."""
        native = load()
        if native is not None:
            try:
                return native.split(text, self.rule)
            except ValueError:
                pass  # it is one of the few that the twin does not take
        return self.words.findall(text)


GPT2_BORDERS = WordBorders(
    _SPACE, re.compile(r"\s*\S+(?:(?!\n\S)[^\S ]\s*\S*)*(?:\n(?=\S))?|\s+"), GPT2
)
LETTERS_FIRST_BORDERS = WordBorders(
    _SPACE,
    re.compile(
        r"[^\S\r\n]*\S+(?:[^\S \r\n][^\S\r\n]*\S+)*(?:(?! )\s*[\r\n])?"  # to a newline, or a space
        r"|\s*[\r\n]"  # behind a space
        r"|\s+"  # at the end
    ),
    LETTERS_FIRST,
)


def find_word_borders(tokenizer: Tokenizer) -> WordBorders | None:
    """Those of a byte-level tokenizer whose text is not changed but for NFC; None where its
    pattern is unknown."""
    state = json.loads(state_of(tokenizer.pre_tokenizer) or "{}")
    if state.get("type") == "ByteLevel":
        return GPT2_BORDERS if state.get("use_regex") else None
    parts = state.get("pretokenizers", []) if state.get("type") == "Sequence" else []
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, level = parts
    pattern = split.get("pattern", {}).get("Regex", "")
    known = split.get("behavior") == "Isolated" and not split.get("invert")
    known = known and not level.get("use_regex")
    return LETTERS_FIRST_BORDERS if known and _LETTERS_FIRST.fullmatch(pattern) else None


def state_of(part: object) -> str:
    """A part of a tokenizer as JSON without spaces; empty where there is none."""
    if part is None:
        return ""
    state = part.__getstate__()
    assert isinstance(state, bytes)
    return json.dumps(json.loads(state), separators=(",", ":"))
