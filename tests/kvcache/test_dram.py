"""The DRAM tier: reserve, commit, pin, evict; random calls keep its invariants."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from xllm.errors import InvalidRequestError, InvariantError
from xllm.kvcache.dram import DramTier
from xllm.kvcache.ranges import FreeRanges


def name(number):
    return number.to_bytes(32, "big")


def names(*numbers):
    return [name(n) for n in numbers]


def sums(count):
    return [b"s" * 16] * count


def tier_of(blocks, peer=b"p"):
    tier = DramTier(blocks * 64)
    tier.open(peer, "L", 64)
    return tier


def fill(tier, *numbers, peer=b"p"):
    tier.reserve(peer, names(*numbers))
    return tier.commit(peer, names(*numbers), sums(len(numbers)))


def test_a_block_is_found_after_its_commit_only():
    tier = tier_of(4)
    assert tier.reserve(b"p", names(1, 2)) == (0, 64)
    assert tier.look_up(b"p", names(1, 2)) == 0
    assert tier.pin(b"p", names(1)) == ((-1, bytes(16)),)
    assert tier.commit(b"p", names(1), [b"c" * 16]) == 1
    assert tier.look_up(b"p", names(1, 2)) == 1
    assert tier.pin(b"p", names(1)) == ((0, b"c" * 16),)
    assert tier.take_events() == (name(1), b"")
    tier.check()


def test_known_blocks_are_not_reserved_twice():
    tier = tier_of(4)
    tier.open(b"q", "L", 64)
    fill(tier, 1)
    assert tier.reserve(b"p", names(1, 2, 2)) == (-1, 64, -1)
    assert tier.reserve(b"q", names(2)) == (-1,)
    assert tier.commit(b"q", names(2), sums(1)) == 0
    tier.check()


def test_layouts_are_apart():
    tier = tier_of(4)
    tier.open(b"q", "M", 128)
    fill(tier, 1)
    assert tier.look_up(b"q", names(1)) == 0
    assert tier.reserve(b"q", names(1)) == (64,)
    tier.commit(b"q", names(1), sums(1))
    assert tier.take_events() == (name(1), b"")
    assert tier.drop(b"p", names(1)) == 1
    assert tier.take_events() == (b"", b"")
    assert tier.drop(b"q", names(1)) == 1
    assert tier.take_events() == (b"", name(1))
    with pytest.raises(InvalidRequestError):
        tier.open(b"r", "L", 128)


def test_a_full_tier_evicts_the_least_recently_used_from_the_ends_of_chains():
    tier = tier_of(4)
    fill(tier, 1, 2)
    fill(tier, 3, 4)
    assert tier.release(b"p", names(1, 2)) == 0
    places = tier.pin(b"p", names(1, 2))
    assert [offset for offset, _ in places] == [0, 64]
    tier.release(b"p", names(1, 2))
    fill(tier, 5)
    assert [tier.look_up(b"p", names(*n)) for n in ((1, 2), (3, 4), (5,))] == [2, 1, 1]
    fill(tier, 6, 7)
    assert [tier.look_up(b"p", names(*n)) for n in ((1, 2), (3,), (5,), (6, 7))] == [1, 0, 1, 2]
    assert tier.statistics().num_evicted_total == 3
    tier.check()


def test_pinned_and_reserved_blocks_are_never_evicted():
    tier = tier_of(2)
    fill(tier, 1)
    tier.pin(b"p", names(1))
    assert tier.reserve(b"p", names(2, 3, 4)) == (64, -1, -1)
    assert tier.statistics().num_refused_total == 2
    tier.release(b"p", names(1))
    assert tier.reserve(b"p", names(3)) == (0,)
    tier.check()


def test_a_peer_that_goes_away_leaves_nothing_held():
    tier = tier_of(4)
    tier.open(b"q", "L", 64)
    fill(tier, 1)
    tier.pin(b"q", names(1, 1))
    tier.pin(b"p", names(1))
    tier.reserve(b"q", names(2))
    tier.close(b"q")
    tier.close(b"q")
    tier.check()
    counts = tier.statistics()
    assert (counts.num_blocks, counts.num_reserved, counts.num_pinned) == (1, 0, 1)
    tier.release(b"p", names(1))
    assert tier.statistics().num_pinned == 0
    with pytest.raises(InvalidRequestError):
        tier.look_up(b"q", names(1))


def test_a_dropped_block_is_a_miss_at_once_and_its_bytes_stay_until_read():
    tier = tier_of(2)
    fill(tier, 1)
    tier.pin(b"p", names(1))
    assert tier.drop(b"p", names(1)) == 1
    assert tier.look_up(b"p", names(1)) == 0
    tier.check()
    assert tier.reserve(b"p", names(1, 2)) == (64, -1)
    tier.check()
    assert tier.release(b"p", names(1)) == 1
    tier.check()
    assert tier.reserve(b"p", names(2)) == (0,)


def test_releasing_gives_up_a_reservation():
    tier = tier_of(1)
    tier.reserve(b"p", names(1))
    assert tier.release(b"p", names(1, 9)) == 1
    assert tier.reserve(b"p", names(2)) == (0,)


def test_events_are_net_of_what_happened_between():
    tier = tier_of(2)
    fill(tier, 1, 2)
    tier.drop(b"p", names(1))
    assert tier.take_events() == (name(2), b"")
    tier.drop(b"p", names(2))
    fill(tier, 2)
    assert tier.take_events() == (b"", b"")
    assert tier.stored_hashes() == name(2)


@pytest.mark.parametrize("block_bytes", [0, -1, 129, 1 << 60])
def test_block_sizes_out_of_bounds_are_refused(block_bytes):
    with pytest.raises(InvalidRequestError) as caught:
        DramTier(128).open(b"p", "L", block_bytes)
    assert caught.value.param == "block_bytes"


def test_a_range_that_is_freed_twice_is_an_invariant_error():
    ranges = FreeRanges(256)
    first, second = ranges.allocate(64), ranges.allocate(100)
    ranges.free(first, 64)
    for offset, size in ((first, 64), (second - 64, 128), (192, 64)):
        with pytest.raises(InvariantError):
            ranges.free(offset, size)
    ranges.free(second, 100)
    ranges.check()
    assert ranges.allocate(256) == 0
    assert ranges.allocate(1) is None


class RandomTier(RuleBasedStateMachine):
    """Random calls of three peers in two layouts, against what must always hold."""

    peers = st.sampled_from([b"a", b"b", b"c"])
    chains = st.lists(st.integers(0, 11).map(name), max_size=6)
    layouts = {b"a": ("L", 64), b"b": ("L", 64), b"c": ("M", 100)}

    @initialize(num_blocks=st.integers(2, 9))
    def make(self, num_blocks):
        self.tier = DramTier(num_blocks * 64)
        for peer, (layout, size) in self.layouts.items():
            self.tier.open(peer, layout, size)
        self.told = set()

    @rule(peer=peers, chain=chains)
    def reserve(self, peer, chain):
        offsets = self.tier.reserve(peer, chain)
        places = [offset for offset in offsets if offset >= 0]
        assert len(places) == len(set(places))

    @rule(peer=peers, chain=chains)
    def commit(self, peer, chain):
        count = self.tier.commit(peer, chain, [b"s" * 16] * len(chain))
        assert count <= len(set(chain))

    @rule(peer=peers, chain=chains)
    def store(self, peer, chain):
        offsets = self.tier.reserve(peer, chain)
        written = [h for h, offset in zip(chain, offsets, strict=True) if offset >= 0]
        assert self.tier.commit(peer, written, [b"s" * 16] * len(written)) == len(written)

    @rule(peer=peers, chain=chains)
    def pin(self, peer, chain):
        run = self.tier.look_up(peer, chain)
        places = self.tier.pin(peer, chain)
        assert all(offset >= 0 for offset, _ in places[:run])

    @rule(peer=peers, chain=chains)
    def release(self, peer, chain):
        self.tier.release(peer, chain)

    @rule(peer=peers, chain=chains)
    def drop(self, peer, chain):
        self.tier.drop(peer, chain)
        # What another peer is writing stays; nothing that was stored does.
        assert self.tier.look_up(peer, chain[:1]) == 0

    @rule(peer=peers)
    def reopen(self, peer):
        self.tier.close(peer)
        self.tier.open(peer, *self.layouts[peer])

    @rule()
    def hear(self):
        stored, removed = self.tier.take_events()
        for i in range(0, len(stored), 32):
            assert stored[i : i + 32] not in self.told
            self.told.add(stored[i : i + 32])
        for i in range(0, len(removed), 32):
            self.told.remove(removed[i : i + 32])
        everything = self.tier.stored_hashes()
        assert self.told == {everything[i : i + 32] for i in range(0, len(everything), 32)}

    @invariant()
    def whole(self):
        if hasattr(self, "tier"):
            self.tier.check()

    def teardown(self):
        if hasattr(self, "tier"):
            for peer in self.layouts:
                self.tier.close(peer)
            self.tier.check()
            counts = self.tier.statistics()
            assert (counts.num_reserved, counts.num_pinned) == (0, 0)


TestRandomTier = RandomTier.TestCase
TestRandomTier.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
