"""The block pool."""

import pytest

from xllm.errors import InvariantError
from xllm.kvcache.blocks import BlockPool, BlockPoolStatistics


def test_blocks_are_given_once_and_come_back():
    pool = BlockPool(4)
    taken = [pool.take() for _ in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.check(taken)
    for block_id in taken:
        assert pool.drop(block_id)
        pool.give_back(block_id)
    assert pool.statistics() == BlockPoolStatistics(4, 4, 0, 0)
    pool.check([])


def test_a_shared_block_lives_until_its_last_holder():
    pool = BlockPool(2)
    block_id = pool.take()
    assert not pool.share(block_id)
    assert not pool.drop(block_id)
    assert pool.refs(block_id) == 1
    assert pool.drop(block_id)
    assert pool.statistics() == BlockPoolStatistics(2, 1, 0, 1)
    assert pool.share(block_id)
    assert pool.statistics() == BlockPoolStatistics(2, 1, 1, 0)


def test_misuse_is_an_invariant_error():
    pool = BlockPool(2)
    block_id = pool.take()
    with pytest.raises(InvariantError, match="while it is held"):
        pool.give_back(block_id)
    pool.drop(block_id)
    with pytest.raises(InvariantError, match="once more than"):
        pool.drop(block_id)


def test_check_knows_a_wrong_holder():
    pool = BlockPool(2)
    block_id = pool.take()
    pool.check([block_id])
    with pytest.raises(InvariantError, match="holders known"):
        pool.check([block_id, block_id])
    with pytest.raises(InvariantError, match="holders known"):
        pool.check([])


def test_check_finds_a_held_block_that_is_not_the_models():
    pool = BlockPool(2)
    pool.pages.put(pool.take())
    with pytest.raises(InvariantError, match="is not the model's, with 1 holders"):
        pool.check()


def test_blocks_are_taken_where_they_are_wanted():
    pool = BlockPool(40)
    assert pool.take(wanted=7) == 7
    assert not pool.is_free(7)
    assert pool.take(wanted=7, after=20) == 21
    assert pool.take(after=7) == 8
    # What continues nothing begins a group of its own, as long as there is one.
    assert pool.take() == 32
    assert pool.take(after=32) == 33
    last = pool.take(after=39)
    pool.check([7, 8, 21, 32, 33, last])
