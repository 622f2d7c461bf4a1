"""How the toy engine's streams are made, and the pure function that predicts them.

A page holds the digest of all that comes before it, then one (token, position) entry a token. The
token at a position is a hash of the page that ends there, the seed, the choice and the position:
so it depends on every token and position of the prefix, in order, and costs the same at any
length. Invariant: nothing here knows of arenas, block tables or steps; `predict` is the oracle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from xllm.protocol.sampling import SamplingParams

DIGEST_BYTES = 16
ENTRY_BYTES = 8
ROOT = blake2b(b"xllm toy stream 1", digest_size=DIGEST_BYTES).digest()
"""The digest in the header of a sequence's first page."""

DEFAULT_IDS = range(16, 1000)
"""Ids that are drawn where no tokenizer says otherwise: none that is likely to be special."""

_ENTRY = struct.Struct("<ii")
_TAIL = struct.Struct("<QIIB")
_MASK = (1 << 64) - 1


def page_digest(page: bytes | bytearray | memoryview) -> bytes:
    """Digest of a full page, its header included: the header of the page after it."""
    return blake2b(page, digest_size=DIGEST_BYTES).digest()


def pack_entries(tokens: Sequence[int], start: int) -> bytes:
    """The entries of `tokens` at positions start, start + 1, ..."""
    flat: list[int] = []
    for position, token in enumerate(tokens, start):
        flat.append(token)
        flat.append(position)
    return struct.pack(f"<{len(flat)}i", *flat)


def pack_entry_into(memory: bytearray, at: int, token: int, position: int) -> None:
    """Write one entry at byte `at`."""
    _ENTRY.pack_into(memory, at, token, position)


def effective_seed(sampling: SamplingParams) -> int:
    """The seed that a draw uses: greedy requests all draw alike."""
    return 0 if sampling.temperature == 0 else sampling.seed or 0


def draw_token(
    page: bytes, seed: int, choice: int, position: int, ids: range, broken: bool = False
) -> int:
    """The token at `position`, after a page that holds the header and all entries up to
    position - 1. `broken` (a page of the prefix did not read back right) gives another one."""
    mixed = blake2b(page + _TAIL.pack(seed, choice, position, broken), digest_size=8).digest()
    return ids.start + int.from_bytes(mixed, "little") % len(ids)


def predict(
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    choice: int,
    count: int,
    ids: range = DEFAULT_IDS,
    outputs: Iterable[int] = (),
    block_size: int = 16,
) -> list[int]:
    """The next `count` tokens of a choice whose output so far is `outputs`.

    Stop ids and limits are the scheduler's business: cut the answer where they apply."""
    seed = effective_seed(sampling)
    full = DIGEST_BYTES + block_size * ENTRY_BYTES
    page = bytearray(ROOT)
    position = 0
    drawn: list[int] = []
    history = [*prompt_ids, *outputs]
    while True:
        while position < len(history):
            if len(page) == full:
                page = bytearray(page_digest(page))
            page += _ENTRY.pack(history[position], position)
            position += 1
        if len(drawn) == count:
            return drawn
        token = draw_token(bytes(page), seed, choice, position, ids)
        drawn.append(token)
        history.append(token)


def cheap_key(prompt_ids: Sequence[int], sampling: SamplingParams, choice: int) -> int:
    """What a stream of the mode without memory depends on, 64 bits."""
    packed = struct.pack(f"<{len(prompt_ids)}i", *prompt_ids)
    packed += _TAIL.pack(effective_seed(sampling), choice, len(prompt_ids), False)
    return int.from_bytes(blake2b(packed, digest_size=8).digest(), "little")


def draw_cheap(key: int, position: int, ids: range) -> int:
    """The token at an absolute position, from the key alone: one multiply-and-fold round."""
    x = (key + position * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return ids.start + (x >> 32) % len(ids)


def predict_cheap(
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    choice: int,
    count: int,
    ids: range = DEFAULT_IDS,
    num_outputs: int = 0,
) -> list[int]:
    """`predict` for the mode without memory, where the output so far matters by its length."""
    key = cheap_key(prompt_ids, sampling, choice)
    first = len(prompt_ids) + num_outputs
    return [draw_cheap(key, position, ids) for position in range(first, first + count)]
