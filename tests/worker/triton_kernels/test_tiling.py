"""How attention is cut into programs, and the distances that kernels count with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.triton_kernels.attention_case import strides_of
from xllm.errors import ConfigError, InvariantError
from xllm.worker.triton_kernels.strides import KvStrides
from xllm.worker.triton_kernels.tiling import (
    cut_decode,
    decode_tiles,
    most_row_tiles,
    power_of_two,
    prefill_tiles,
    row_tiles,
    tile_tokens,
)

SHARED_BYTES = 227 << 10
QWEN3 = strides_of(8, 128, 128, torch.bfloat16)


def cut(num_seqs, max_length, **options):
    given = {"num_rows": 1, "num_heads": 32, "multiprocessors": 132} | options
    return cut_decode(QWEN3, num_seqs=num_seqs, max_length=max_length, **given)


def test_a_small_batch_fills_the_gpu():
    alone = cut(1, 32768)
    assert alone.splits * QWEN3.num_kv_heads >= 4 * 132
    assert cut(64, 2048).splits * 64 * QWEN3.num_kv_heads >= 4 * 132


def test_a_large_batch_is_not_split():
    assert cut(256, 2048).splits == 1
    assert cut(256, 2048).scratch_numbers(256 * 32, 128) == 0


def test_a_split_is_worth_its_merge():
    assert cut(1, 300).splits == 2
    assert cut(1, 100).splits == 1
    assert cut(1, 0).splits == 1


def test_splits_of_one_size_depend_on_the_length_alone():
    for num_seqs in (1, 500):
        assert cut(num_seqs, 1000, split_tokens=256).splits == 4


@pytest.mark.parametrize("split_tokens", [-64, 100])
def test_splits_are_whole_tiles(split_tokens):
    with pytest.raises(InvariantError, match=r"no multiple of a tile's"):
        cut(1, 1000, split_tokens=split_tokens)


def test_heads_share_evenly():
    with pytest.raises(InvariantError, match="30 heads over 8"):
        cut(1, 1000, num_heads=30)


@given(
    st.sampled_from([16, 64, 80, 96, 128, 192, 256]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 300),
)
def test_tiles_fit(head_dim, dtype, rows):
    """All tiles are powers of two, and what is loaded ahead fits in shared memory."""
    strides = strides_of(2, head_dim, 64, dtype)
    padded = power_of_two(head_dim)
    for tiles in (decode_tiles(strides, rows), prefill_tiles(strides)):
        for size in (tiles.rows, tiles.tokens):
            assert size == power_of_two(size) >= 16
        ahead = (tiles.num_stages - 1) * 2 * tiles.tokens * padded
        assert (ahead + tiles.rows * padded) * dtype.itemsize < SHARED_BYTES


@given(st.data())
def test_row_tiles_cover_every_row_once(data):
    counts = data.draw(st.lists(st.integers(0, 40), max_size=6))
    lengths = [count + data.draw(st.integers(0, 100)) for count in counts]
    tokens = data.draw(st.sampled_from([1, 16, 18, 32]))
    most = most_row_tiles(sum(counts), len(counts), tokens)
    tiles = row_tiles(counts, lengths, tokens, most)
    assert len(tiles) == most
    real = [tile for tile in tiles if tile[0] >= 0]
    assert tiles[len(real) :] == [(-1, 0)] * (most - len(real))
    covered = [
        (sequence, row)
        for sequence, first in real
        for row in range(first, min(first + tokens, counts[sequence]))
    ]
    assert sorted(covered) == [(s, row) for s, count in enumerate(counts) for row in range(count)]


def test_those_that_see_most_come_first():
    tiles = row_tiles([40, 1, 32], [40, 500, 96], 16)
    assert tiles == [(1, 0), (2, 16), (2, 0), (0, 32), (0, 16), (0, 0)]


def test_too_many_tiles_are_refused():
    with pytest.raises(InvariantError, match="3 tiles of rows in room for 2"):
        row_tiles([40], [40], 16, 2)


def test_a_tile_holds_the_heads_of_a_group():
    assert tile_tokens(QWEN3, 32) == 32
    assert tile_tokens(QWEN3, 8 * 7) == 18
    assert tile_tokens(QWEN3, 8 * 200) == 1


@pytest.mark.parametrize("size", [0, 24, -16])
def test_a_block_is_a_power_of_two(size):
    with pytest.raises(ConfigError, match="block_size must be a power of two"):
        KvStrides(size, 64, 64, 64, 64, 1, 64, torch.bfloat16)


def test_heads_lie_in_whole_pieces():
    with pytest.raises(ConfigError, match="a head of 12 numbers"):
        strides_of(1, 12, 16, torch.bfloat16)


def test_values_are_no_longer_than_keys():
    with pytest.raises(ConfigError, match="values of 64 numbers behind keys of 32"):
        strides_of(1, 32, 16, value_dim=64)
