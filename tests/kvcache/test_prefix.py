"""The prefix cache: chains, eviction, and random histories against a plain model of it."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm.kvcache.blocks import BlockPool
from xllm.kvcache.hashing import chain_hashes, root_hash, split_hashes
from xllm.kvcache.prefix import PrefixCache

ROOT = root_hash("r")


def hashes_of(tokens) -> list[bytes]:
    return split_hashes(chain_hashes(ROOT, tokens, 1))


def fill(cache: PrefixCache, tokens) -> list[int]:
    """Allocate and seal a chain; still held."""
    blocks = cache.allocate(len(tokens))
    assert blocks is not None
    parent = b""
    for block_id, content in zip(blocks, hashes_of(tokens), strict=True):
        assert cache.seal(block_id, content, parent)
        parent = content
    return blocks


def test_a_released_chain_is_found_again():
    cache = PrefixCache(BlockPool(8))
    blocks = fill(cache, [1, 2, 3])
    cache.release(blocks)
    assert cache.num_available == 8
    found = cache.match(hashes_of([1, 2, 9]))
    assert found.block_ids == blocks[:2]
    assert found.num_unheld == 2
    assert cache.match(hashes_of([1, 2, 3]), limit=1).block_ids == blocks[:1]
    assert cache.match(hashes_of([2])).block_ids == []
    cache.acquire(found.block_ids)
    assert cache.match(hashes_of([1, 2])).num_unheld == 0
    cache.check(blocks[:2])


def test_leaves_go_first_and_the_oldest_chain_before_the_others():
    cache = PrefixCache(BlockPool(6))
    old, new = fill(cache, [1, 2, 3]), fill(cache, [4, 5, 6])
    cache.release(old)
    cache.release(new)
    assert cache.allocate(1) == [old[2]]
    assert cache.allocate(1) == [old[1]]
    again = cache.match(hashes_of([1]))
    assert again.block_ids == old[:1]
    cache.acquire(again.block_ids)
    cache.release(again.block_ids)
    assert sorted(cache.allocate(3)) == sorted(new)
    assert cache.match(hashes_of([1])).block_ids == old[:1]


def test_an_allocation_that_cannot_be_met_changes_nothing():
    cache = PrefixCache(BlockPool(4))
    held = fill(cache, [1, 2])
    other = fill(cache, [3])
    cache.release(other)
    assert cache.allocate(3) is None
    assert cache.match(hashes_of([3])).block_ids == other
    cache.check(held)


def test_a_held_content_is_cached_once():
    cache = PrefixCache(BlockPool(4))
    first = fill(cache, [1])
    second = cache.allocate(1)
    assert not cache.seal(second[0], hashes_of([1])[0], b"")
    cache.check([*first, *second])
    cache.release(second)
    assert cache.pool.num_free == 3


def test_an_unheld_content_gives_way_and_its_children_stay():
    cache = PrefixCache(BlockPool(4))
    chain = fill(cache, [1, 2])
    cache.release(chain)
    mine = cache.allocate(1)
    assert cache.seal(mine[0], hashes_of([1])[0], b"")
    assert cache.match(hashes_of([1, 2])).block_ids == [mine[0], chain[1]]
    cache.check(mine)
    cache.release(mine)
    assert cache.num_available == 4


def test_a_broken_chain_is_cached_when_it_is_released():
    cache = PrefixCache(BlockPool(8))
    first = fill(cache, [1])
    mine = cache.allocate(2)
    cache.seal_and_release(mine, hashes_of([1, 2]))
    cache.check(first)
    assert cache.match(hashes_of([1, 2])).block_ids == [first[0], mine[1]]


def test_a_broken_chain_with_another_holder_is_not_cached():
    cache = PrefixCache(BlockPool(8))
    first = fill(cache, [1])
    mine = cache.allocate(2)
    cache.acquire(mine)
    cache.seal_and_release(mine, hashes_of([1, 2]))
    cache.release(first)
    cache.check(mine)
    cache.seal_and_release(mine, hashes_of([1, 2]))
    cache.check([])
    assert len(cache.match(hashes_of([1, 2])).block_ids) == 2


def test_events_are_net_changes():
    cache = PrefixCache(BlockPool(2))
    assert cache.drain_events() is None
    one, two = hashes_of([1, 2])
    cache.release(fill(cache, [1, 2]))
    events = cache.drain_events()
    assert (events.stored, events.removed) == (one + two, b"")
    blocks = cache.allocate(2)
    cache.release(blocks)
    cache.release(fill(cache, [1]))
    events = cache.drain_events()
    assert (events.stored, events.removed) == (b"", two)
    assert cache.snapshot() == one


class Histories(RuleBasedStateMachine):
    """Sequences with tables of one-token blocks come, grow, fork and go in any order; a plain
    dictionary remembers what each block was filled with."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(BlockPool(7))
        self.tables: list[tuple[list[int], list[int], int]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.index: set[bytes] = set()

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def start(self, tokens):
        hashes = hashes_of(tokens)
        match = self.cache.match(hashes)
        for position, block_id in enumerate(match.block_ids):
            assert self.content[block_id] == tuple(tokens[: position + 1])
        if len(tokens) - len(match.block_ids) + match.num_unheld > self.cache.num_available:
            return
        self.cache.acquire(match.block_ids)
        fresh = self.cache.allocate(len(tokens) - len(match.block_ids))
        assert fresh is not None
        blocks = match.block_ids + fresh
        sealed = len(match.block_ids)
        self.tables.append(self.fill(blocks, tokens, sealed))

    def fill(self, blocks, tokens, sealed):
        hashes = hashes_of(tokens)
        for position in range(sealed, len(tokens)):
            block_id = blocks[position]
            if not self.cache.hash_of(block_id):
                self.content[block_id] = tuple(tokens[: position + 1])
            parent = hashes[position - 1] if position else b""
            if sealed == position and self.cache.seal(block_id, hashes[position], parent):
                sealed += 1
        return blocks, tokens, sealed

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), token=st.integers(0, 2))
    def grow(self, data, token):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        blocks, tokens, sealed = self.tables[index]
        fresh = self.cache.allocate(1)
        if fresh is None:
            assert self.cache.num_available == 0
            return
        self.tables[index] = self.fill(blocks + fresh, [*tokens, token], sealed)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        blocks, tokens, sealed = data.draw(st.sampled_from(self.tables))
        self.cache.acquire(blocks)
        self.tables.append((list(blocks), list(tokens), sealed))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), late=st.booleans())
    def end(self, data, late):
        blocks, tokens, sealed = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        if late and sealed < len(tokens):
            self.cache.seal_and_release(blocks, hashes_of(tokens))
        else:
            self.cache.release(blocks)

    @rule()
    def drain(self):
        events = self.cache.drain_events()
        if events is not None:
            stored, removed = split_hashes(events.stored), split_hashes(events.removed)
            assert not self.index & set(stored)
            assert self.index >= set(removed)
            self.index = (self.index | set(stored)) - set(removed)
        assert self.index == set(split_hashes(self.cache.snapshot()))

    @invariant()
    def holds(self):
        self.cache.check([block_id for blocks, _, _ in self.tables for block_id in blocks])
        for blocks, tokens, _ in self.tables:
            for position, block_id in enumerate(blocks):
                assert self.content[block_id] == tuple(tokens[: position + 1])


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
