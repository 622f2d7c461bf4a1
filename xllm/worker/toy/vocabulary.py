"""Which ids the toy engine may draw: those of the served tokenizer that are ordinary text.

It reads the tokenizer's file, not the tokenizer. Invariant: no special or added token is in the
range, so that a stream ends only where the scheduler ends it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from xllm.errors import DependencyError
from xllm.worker.toy.stream import DEFAULT_IDS


class _AddedToken(msgspec.Struct):
    id: int


class _TokenModel(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _TokenizerFile(msgspec.Struct):
    model: _TokenModel
    added_tokens: list[_AddedToken] = []


def toy_vocabulary(model_dir: str) -> tuple[int, range]:
    """(vocabulary size, ids that may be drawn) of a model directory; without a tokenizer.json,
    those of the default. DependencyError if the file is not one."""
    path = Path(model_dir) / "tokenizer.json"
    if not model_dir or not path.is_file():
        return DEFAULT_IDS.stop, DEFAULT_IDS
    try:
        tokenizer = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DependencyError(f"{path} is no tokenizer: {error}", param="model.path") from error
    vocab = tokenizer.model.vocab
    special = sorted({token.id for token in tokenizer.added_tokens})
    known = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    size = max([*special, max(known, default=-1)]) + 1 if special or vocab else 0
    ids = widest_gap(special, size)
    if len(ids) < 2:
        raise DependencyError(f"{path} has no ordinary tokens", param="model.path")
    return size, ids


def widest_gap(special: list[int], size: int) -> range:
    """The longest run of ids below `size` that holds none of the sorted `special`."""
    best = range(0)
    start = 0
    for border in [*special, size]:
        if border - start > len(best):
            best = range(start, border)
        start = border + 1
    return best
