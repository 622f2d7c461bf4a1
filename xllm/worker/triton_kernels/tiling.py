"""How attention is cut into programs of a GPU. Numbers only.

The choices are static by head size and type: what is tuned at run time differs from run to run,
and with it the order of sums. They are made for an H100 (132 multiprocessors with 227 KiB of
shared memory and 256 KiB of registers each) and fit an A100 (108; 163 KiB).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xllm.errors import InvariantError
from xllm.worker.triton_kernels.strides import KvStrides

MIN_ROWS = 16
"""Rows of the smallest product of tensor cores: fewer are padded."""

_PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_SPLIT_TOKENS = 256
"""Of a decode's splits, unless the split size is given."""
_MAX_SPLITS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionTiles:
    """A program's tile: `rows` of queries against `tokens` keys at a time; how many warps work on
    it, and how many tiles are loaded ahead (stages)."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeCut:
    """A decode's programs: `row_tiles` of `tiles.rows` rows for each head of keys, `splits` of each
    sequence. `split_tokens`: of each split; 0: a sequence is cut into `splits` equal parts."""

    tiles: AttentionTiles
    row_tiles: int
    splits: int
    split_tokens: int

    def scratch_numbers(self, rows: int, value_dim: int) -> int:
        """fp32 numbers of scratch memory for `rows` rows (of all sequences and heads)."""
        return 0 if self.splits == 1 else rows * self.splits * (value_dim + 1)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `number` nor below `least`."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def decode_tiles(strides: KvStrides, rows: int) -> AttentionTiles:
    """The tile for `rows` rows a head of keys.

    A decode reads each key once and computes little with it: what counts is how many bytes are
    under way. Three stages hold two tiles of 64 keys and values of 128 numbers ahead, 64 KiB in 16
    bits, so that three programs share a multiprocessor and one loads where another reduces. Smaller
    heads take longer tiles, larger ones shorter, to keep to that. Four warps: of a product with 16
    rows each takes a quarter of the tile's tokens.
    """
    wide = strides.head_dim > 256
    most = 32 if wide else 64
    held = min(power_of_two(rows, MIN_ROWS), most)
    tokens = 8192 // power_of_two(strides.value_numbers_of_token, 64)
    if strides.item_bytes > 2:
        tokens //= 4  # products without tensor cores take registers, too
    return AttentionTiles(held, min(max(tokens, 16), 128), 8 if wide else 4, 2 if wide else 3)


def prefill_tiles(strides: KvStrides) -> AttentionTiles:
    """The tile of a prefill.

    A prefill is bound by products: 128 rows are two groups of four warps, each of which keeps its
    64 rows of sums in registers (a 64 x 128 fp32 tile takes 64 of a thread's 255) and multiplies
    them with tiles of keys out of shared memory: 32 KiB of queries and three stages of 32 KiB each
    at 64 tokens of 128 numbers in 16 bits. Heads of 256 halve the tokens, those beyond (MLA's 512)
    the rows as well. fp32 has no tensor cores here and takes small tiles.
    """
    dim = power_of_two(strides.value_numbers_of_token, 64)
    if strides.item_bytes > 2:
        return AttentionTiles(16 if dim > 128 else 32, 16, 4, 2)
    if dim > 256:
        return AttentionTiles(64, 16, 8, 2)
    if dim > 128:
        return AttentionTiles(128, 32, 8, 2)
    return AttentionTiles(128, 64, 8, 3)


def cut_decode(
    strides: KvStrides,
    *,
    num_seqs: int,
    num_rows: int,
    num_heads: int,
    max_length: int,
    multiprocessors: int,
    split_tokens: int = 0,
) -> DecodeCut:
    """The programs for `num_seqs` sequences of `num_rows` rows with `num_heads` heads and up to
    `max_length` keys: only what the host knows, so that a graph stays right for other lengths.

    Splits until there are four programs for each multiprocessor (two run on it at a time, and the
    second two even out what lengths differ), none of less than 256 tokens: sequences shorter than
    `max_length` are cut into fewer by the kernel. With `split_tokens` (a multiple of a tile's
    tokens) the cut of a sequence depends on its length alone. Raises InvariantError for a split
    size that is none.
    """
    if num_heads % strides.num_kv_heads:
        raise InvariantError(f"{num_heads} heads over {strides.num_kv_heads} heads of keys")
    rows = num_rows * (num_heads // strides.num_kv_heads)
    tiles = decode_tiles(strides, rows)
    row_tiles = -(-rows // tiles.rows)
    if split_tokens:
        if split_tokens < 0 or split_tokens % tiles.tokens:
            raise InvariantError(
                f"splits of {split_tokens} tokens are no multiple of a tile's {tiles.tokens}"
            )
        return DecodeCut(tiles, row_tiles, max(-(-max_length // split_tokens), 1), split_tokens)
    programs = max(num_seqs * strides.num_kv_heads * row_tiles, 1)
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs)
    splits = min(wanted, -(-max_length // MIN_SPLIT_TOKENS), _MAX_SPLITS)
    return DecodeCut(tiles, row_tiles, max(splits, 1), 0)


def tile_tokens(strides: KvStrides, num_heads: int) -> int:
    """Tokens of a prefill's tile: its rows are the heads of a group, token by token."""
    return max(prefill_tiles(strides).rows // (num_heads // strides.num_kv_heads), 1)


def most_row_tiles(num_rows: int, num_seqs: int, tokens: int) -> int:
    """How many tiles of `tokens` tokens `num_rows` rows of `num_seqs` sequences take at most."""
    return num_rows // tokens + min(num_seqs, num_rows)


def row_tiles(
    counts: Sequence[int], lengths: Sequence[int], tokens: int, num_tiles: int = 0
) -> list[tuple[int, int]]:
    """(sequence, its first row) of each tile of `tokens` rows, for sequences that compute their
    last `counts` tokens of `lengths`; filled up to `num_tiles` with (-1, 0), which do nothing.

    Those that see most keys come first: a GPU starts programs in order, and a long one that starts
    last is waited for. Raises InvariantError where more tiles are needed than `num_tiles`.
    """
    tiles = [
        (sequence, first)
        for sequence, count in enumerate(counts)
        for first in range(0, count, tokens)
    ]

    def unseen(tile: tuple[int, int]) -> int:
        sequence, first = tile
        return counts[sequence] - lengths[sequence] - min(first + tokens, counts[sequence])

    tiles.sort(key=unseen)
    if num_tiles and len(tiles) > num_tiles:
        raise InvariantError(f"{len(tiles)} tiles of rows in room for {num_tiles}")
    return tiles + [(-1, 0)] * (num_tiles - len(tiles))
