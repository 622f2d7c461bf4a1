"""Vectors that the toy engine makes up, and the pure function that predicts them.

A page digest stands for all that comes before it, so the vector of the last token depends on every
token and position of the text, as a stream does. That of the mean is made of the sum of a hash of
each entry that was run here, so that a row that was skipped or doubled changes it. Invariant:
nothing here knows of arenas; `predict_vector` is the oracle.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

from xllm.protocol.step import StepItem
from xllm.worker.toy.sequence import ToySequence
from xllm.worker.toy.stream import DIGEST_BYTES, ENTRY_BYTES, ROOT, pack_entries, page_digest

Tail = Callable[[Sequence[int], int], bytes]
"""Block table and length to the page that ends there."""

WIDTH = 16
"""Numbers of a vector."""

_SUM_BYTES = 16
_MASK = (1 << (8 * _SUM_BYTES)) - 1
_WORDS = struct.Struct(f"<{WIDTH}i")


def last_vector(page: bytes, position: int, broken: bool = False) -> bytes:
    """The vector of a text of `position` tokens whose last page, with its header, is `page`."""
    return _vector(page + struct.pack("<iB", position, broken))


def sum_entries(total: int, tokens: Sequence[int], start: int) -> int:
    """`total` and a hash of each of `tokens`, at positions from `start` on; in any order."""
    packed = pack_entries(tokens, start)
    for at in range(0, len(packed), ENTRY_BYTES):
        entry = blake2b(packed[at : at + ENTRY_BYTES], digest_size=_SUM_BYTES).digest()
        total += int.from_bytes(entry, "little")
    return total & _MASK


def mean_vector(total: int, position: int) -> bytes:
    """The vector of a text of `position` tokens whose entries sum up to `total`."""
    return _vector(total.to_bytes(_SUM_BYTES, "little") + struct.pack("<i", position))


def predict_vector(
    prompt_ids: Sequence[int], pooling: str, block_size: int = 16, memory: bool = True
) -> bytes:
    """The vector of a text: float32, of length one. `memory` off: the cheap mode's."""
    num = len(prompt_ids)
    if pooling == "mean":
        return mean_vector(sum_entries(0, prompt_ids, 0), num)
    if not memory:
        return last_vector(pack_entries(prompt_ids, 0), num)
    header = ROOT
    for start in range(0, num, block_size):
        page = header + pack_entries(prompt_ids[start : start + block_size], start)
        header = page_digest(page)
    assert len(page) <= DIGEST_BYTES + block_size * ENTRY_BYTES
    return last_vector(page, num)


class VectorFrame:
    """Collects the vectors of one step: see StepResult's `pooled`."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self._data = bytearray()

    def add_item(
        self, index: int, item: StepItem, sequence: ToySequence | None, tail: Tail | None
    ) -> None:
        """The rows of item `index`, which has run, and the vector if they are the last; items
        come in order. `tail` reads back a last page; None in the mode without memory."""
        if sequence is None or not sequence.pooling:
            return
        end, tokens = item.start + item.num_tokens, sequence.tokens
        is_mean = sequence.pooling == "mean"
        if is_mean:
            sequence.total = sum_entries(sequence.total, tokens[item.start : end], item.start)
        if end < len(tokens):
            return
        self.items.append(index)
        if is_mean:
            self._data += mean_vector(sequence.total, end)
        else:
            page = tail(sequence.table, end) if tail is not None else pack_entries(tokens, 0)
            self._data += last_vector(page, end, sequence.broken)

    def frames(self) -> tuple[bytes, ...]:
        """The frame, if there is any vector."""
        return (bytes(self._data),) if self.items else ()


def _vector(seed: bytes) -> bytes:
    """WIDTH numbers out of a hash, of length one."""
    numbers = _WORDS.unpack(blake2b(seed, digest_size=_WORDS.size).digest())
    length = math.sqrt(sum(number * number for number in numbers))
    return array("f", [number / length for number in numbers]).tobytes()
