"""The index against a dictionary of sets, its bounds, and what it says of bad input."""

from __future__ import annotations

import random
import subprocess
import sys
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.errors import InvalidRequestError, InvariantError
from xllm.kvcache.digest import digest_of, hash_key
from xllm.kvcache.index import KvIndex
from xllm.kvcache.index_keys import hash_keys
from xllm.kvcache.index_parts import TIERS, CachedPrefix

ROOMY = 64 << 20
SMALL = 1 << 20
PUBLISHERS = tuple(f"i{n}" for n in range(4))


def name(number):
    return sha256(number.to_bytes(8, "big")).digest()


def chain(numbers):
    return b"".join(map(name, numbers))


class Naive:
    """What the index should be, slowly."""

    def __init__(self):
        self.sets = {}
        self.hidden = set()

    def apply(self, publisher, stored, removed, tier):
        held = self.sets.setdefault((publisher, tier), set())
        held -= set(removed)
        held |= set(stored)

    def forget(self, publisher):
        self.sets = {key: held for key, held in self.sets.items() if key[0] != publisher}
        self.hidden.discard(publisher)

    def match(self, numbers):
        found = {}
        for (publisher, tier), held in self.sets.items():
            length = next((at for at, n in enumerate(numbers) if n not in held), len(numbers))
            if length and publisher not in self.hidden:
                known = found.get(publisher, CachedPrefix())
                found[publisher] = known._replace(**{tier: length})
        return found


def compare(index, naive, chains):
    index.check()
    for numbers in chains:
        assert index.match(chain(numbers)) == naive.match(numbers)
    for (publisher, tier), held in naive.sets.items():
        part = index.part(publisher, tier)
        assert part.num_blocks == len(held)
        assert part.digest == digest_of(chain(held))
        assert part.is_whole
    counts = index.statistics()
    assert counts.num_entries == sum(map(len, naive.sets.values()))
    assert counts.num_keys == len(set().union(*naive.sets.values()))


FAMILIES, LONGEST = 4, 100
BLOCKS = st.lists(st.integers(0, FAMILIES * LONGEST - 1), max_size=60)
LENGTHS = st.lists(st.integers(0, LONGEST), min_size=FAMILIES, max_size=FAMILIES)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("device"), st.sampled_from(PUBLISHERS), LENGTHS, st.booleans()),
        st.tuples(
            st.just("apply"),
            st.sampled_from(PUBLISHERS),
            BLOCKS,
            BLOCKS,
            st.sampled_from(TIERS[1:]),
        ),
        st.tuples(
            st.just("replace"), st.sampled_from(PUBLISHERS), BLOCKS, st.sampled_from(TIERS[1:])
        ),
        st.tuples(st.just("forget"), st.sampled_from(PUBLISHERS)),
        st.tuples(st.just("hide"), st.sampled_from(PUBLISHERS), st.booleans()),
    ),
    max_size=30,
)


def device_blocks(lengths):
    """A device tier has whole beginnings of chains: numbers of a family follow each other."""
    return {f * LONGEST + n for f, length in enumerate(lengths) for n in range(length)}


@settings(max_examples=60, deadline=None)
@given(STEPS, st.lists(BLOCKS, max_size=3))
def test_any_history_gives_what_a_dictionary_of_sets_gives(steps, chains):
    index, naive = KvIndex(ROOMY), Naive()
    families = [range(f * LONGEST, (f + 1) * LONGEST) for f in range(FAMILIES)]
    for kind, publisher, *rest in steps:
        if kind == "device":
            wanted = device_blocks(rest[0])
            held = naive.sets.get((publisher, "device"), set())
            if rest[1]:
                index.replace(publisher, "device", chain(wanted))
            else:
                # What is told again, or was never there, changes nothing.
                index.apply(publisher, chain(wanted), chain({*(held - wanted), 99_999}))
            naive.sets[publisher, "device"] = wanted
        elif kind == "apply":
            stored, removed, tier = rest
            index.apply(publisher, chain(stored), chain(removed), tier)
            naive.apply(publisher, stored, removed, tier)
        elif kind == "replace":
            numbers, tier = rest
            numbers = list(dict.fromkeys(numbers))
            index.replace(publisher, tier, chain(numbers))
            naive.sets[publisher, tier] = set(numbers)
        elif kind == "forget":
            index.forget(publisher)
            naive.forget(publisher)
        else:
            index.hide(publisher, rest[0])
            (naive.hidden.add if rest[0] else naive.hidden.discard)(publisher)
    compare(index, naive, [*families, *(one[:n] for one in families for n in (1, 33, 65))])
    if not any(tier == "device" for _, tier in naive.sets):
        compare(index, naive, chains)


@pytest.mark.parametrize("tier", TIERS)
def test_long_histories_with_rebuildings(tier):
    """Many publishers (more than one column), chains, and far more churn than slots."""
    rng = random.Random(5)
    index, naive = KvIndex(ROOMY, rng.getrandbits(64) | 1), Naive()
    publishers = [f"p{n}" for n in range(70)]
    for _ in range(300):
        publisher = rng.choice(publishers)
        held = sorted(naive.sets.get((publisher, tier), set()))
        removed = [n for n in held if n % 1000 >= rng.randrange(1000)]
        if tier == "device":
            cut = {n // 1000: n % 1000 for n in reversed(removed)}
            removed = [n for n in held if n % 1000 >= cut.get(n // 1000, 1000)]
        start = 1000 * rng.randrange(20)
        stored = range(start, start + rng.randrange(1000))
        index.apply(publisher, chain(stored), chain(removed), tier)
        naive.apply(publisher, stored, removed, tier)
    chains = [range(1000 * n, 1000 * n + length) for n in range(20) for length in (1, 300, 1000)]
    compare(index, naive, chains)
    assert index.statistics().num_rebuilt > 5


def test_lengths_differ_by_publisher_and_tier():
    index = KvIndex(ROOMY)
    for number in range(64):
        index.apply(f"p{number}", chain(range(1 + 15 * number)))
    index.apply("p3", chain(range(5)), tier="dram")
    index.apply("daemon", chain([*range(7), *range(8, 900)]), tier="dram")
    index.apply("disk", chain(range(1000)), tier="ssd")
    found = index.match(chain(range(1000)))
    assert found["p3"] == CachedPrefix(46, 5, 0)
    assert found["daemon"] == CachedPrefix(0, 7, 0)
    assert found["disk"] == CachedPrefix(0, 0, 1000)
    assert [found[f"p{n}"].device for n in range(64)] == [1 + 15 * n for n in range(64)]
    assert index.match(chain([5000, *range(10)])) == {}
    assert index.match(b"") == {}


def test_who_is_not_known_is_not_spoken_of_and_comes_back():
    index = KvIndex(ROOMY)
    index.hide("p")
    index.apply("p", chain(range(4)))
    assert index.match(chain(range(4))) == {}
    index.hide("p", False)
    assert index.match(chain(range(9))) == {"p": CachedPrefix(4)}


@pytest.mark.parametrize("num_publishers", [1, 130])
def test_the_limit_of_bytes_holds_and_what_is_used_stays(num_publishers):
    """Three times as many blocks as fit: bytes stay, the prompts asked for stay, and whoever lost
    blocks is no longer whole. What the index says is never more than what was stored."""
    index = KvIndex(SMALL)
    publishers = [f"p{n}" for n in range(num_publishers)]
    wanted = chain(range(50))
    for publisher in publishers:
        index.apply(publisher, wanted)
    fits = SMALL // 17 // 2
    for start in range(1000, 1000 + 3 * fits, 500):
        index.apply(publishers[start % num_publishers], chain(range(start, start + 500)))
        assert len(index.match(wanted)) == num_publishers
        assert index.statistics().num_bytes <= SMALL
    counts = index.statistics()
    assert counts.num_dropped > 0
    assert index.is_full
    index.check()
    last = publishers[start % num_publishers]
    assert not index.part(publishers[0], "device").is_whole
    assert index.match(chain(range(start, start + 500))) == {last: CachedPrefix(500)}
    assert index.match(chain(range(1000, 1500))) == {}


def test_a_part_that_is_larger_than_the_limit_does_not_break_it():
    index = KvIndex(SMALL)
    index.replace("p", "device", chain(range(120_000)))
    assert index.statistics().num_bytes <= SMALL
    assert not index.part("p", "device").is_whole
    index.check()
    index.replace("p", "device", chain(range(10)))
    assert index.part("p", "device").is_whole
    assert index.part("p", "device").digest == digest_of(chain(range(10)))


def test_a_bit_that_is_free_again_says_nothing_of_its_last_owner():
    index = KvIndex(ROOMY)
    for number in range(64):
        index.apply(f"p{number}", chain(range(number, number + 10)))
    index.forget("p20")
    index.apply("fresh", chain([500]))
    assert "fresh" not in index.match(chain(range(20, 30)))
    assert index.match(chain([500])) == {"fresh": CachedPrefix(1)}
    index.check()


def test_two_hashes_with_one_key_make_a_part_that_is_not_whole():
    index = KvIndex(ROOMY)
    twin = name(1)[:8] + bytes(24)
    index.replace("p", "device", name(1) + twin)
    assert not index.part("p", "device").is_whole
    assert index.part("p", "device").num_blocks == 1


def test_keys_that_begin_alike_are_spread():
    """Without the multiplier they would all crowd one place."""
    index = KvIndex(ROOMY)
    hashes = b"".join(bytes(6) + n.to_bytes(2, "big") + bytes(24) for n in range(20_000))
    index.apply("p", hashes)
    assert index.match(hashes) == {"p": CachedPrefix(20_000)}
    index.check()


def test_bad_input_names_the_field_and_changes_nothing():
    index = KvIndex(ROOMY)
    index.apply("p", name(1))
    for call, param in (
        (lambda: index.apply("p", b"x" * 31), "stored"),
        (lambda: index.apply("p", name(2), b"x"), "removed"),
        (lambda: index.apply("p", name(2), b"", "tape"), "tier"),
        (lambda: index.replace("p", "tape", name(2)), "tier"),
        (lambda: index.match(b"x"), "hashes"),
        (lambda: KvIndex(ROOMY, 2), "multiplier"),
    ):
        with pytest.raises(InvalidRequestError) as error:
            call()
        assert error.value.param == param
    assert index.statistics().num_entries == 1


def test_the_digest_does_not_depend_on_order_and_tells_sets_apart():
    numbers = list(range(100))
    assert digest_of(chain(numbers)) == digest_of(chain(reversed(numbers)))
    assert digest_of(chain(numbers)) != digest_of(chain(numbers[1:]))
    assert digest_of(b"") == 0
    assert hash_key(bytes(32)) == 1
    hashes = [bytes(32), *map(name, numbers)]
    assert hash_keys(b"".join(hashes)).tolist() == [hash_key(one) for one in hashes]


def test_masters_and_daemons_need_no_numpy():
    """They keep digests, one block at a time."""
    code = "import sys, xllm.kvcache.prefix, xllm.kvcache.dram; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_check_finds_a_count_that_is_wrong():
    index = KvIndex(ROOMY)
    index.apply("p", name(1))
    index.part("p", "device").num_blocks = 2
    with pytest.raises(InvariantError):
        index.check()


def device_history(index, naive, rng, turns, num_chains=40, length=1000):
    """Publishers that store and evict ends of chains, some of which came in pieces."""
    for _ in range(turns):
        publisher = f"p{rng.randrange(70)}"
        start = length * rng.randrange(num_chains)
        held = naive.sets.get((publisher, "device"), set())
        there = sum(start + n in held for n in range(length))
        if rng.random() < 0.4:
            gone = range(start + there - 1, start + rng.randrange(there + 1) - 1, -1)
            index.apply(publisher, b"", chain(gone))
            naive.apply(publisher, (), gone, "device")
        else:
            come = range(start + there, start + min(length, there + rng.choice((1, 7, 200, 900))))
            index.apply(publisher, chain(come))
            naive.apply(publisher, come, (), "device")
    return [range(length * n, length * n + m) for n in range(num_chains) for m in (40, length)]


def test_the_index_is_right_while_its_log_is_renewed():
    """Entries are moved a few thousand at a time: at several moments in between all is there."""
    rng = random.Random(11)
    index, naive = KvIndex(ROOMY, rng.getrandbits(64) | 1), Naive()
    num_between = 0
    for _ in range(150):
        chains = device_history(index, naive, rng, 3)
        if index.is_renewing:
            num_between += 1
            compare(index, naive, rng.sample(chains, 8))
    compare(index, naive, chains)
    assert num_between >= 3
    assert index.statistics().num_rebuilt >= 3


@pytest.mark.parametrize("piece", [1, 3, 50, 333])
def test_a_chain_that_came_in_pieces_and_with_holes_is_followed_to_its_end(piece):
    rng = random.Random(piece)
    index, naive = KvIndex(ROOMY), Naive()
    pieces = [range(at, min(1000, at + piece)) for at in range(0, 1000, piece)]
    rng.shuffle(pieces)
    for number, blocks in enumerate(pieces):
        for publisher in ("a", "b", "c")[: 1 + number % 3]:
            index.apply(publisher, chain(blocks))
            naive.apply(publisher, blocks, (), "device")
    for hole in (999, 700, 431, 32, 1):
        # Nobody has it, but it may still lie in the log.
        for publisher in ("a", "b", "c"):
            index.apply(publisher, chain(range(hole)), chain([hole]))
            naive.apply(publisher, range(hole), [hole], "device")
        compare(index, naive, [range(n) for n in (1, 31, 32, 33, 500, 1000, 1100)])


def test_keys_of_which_the_hash_knows_the_same_are_told_apart():
    """Places of the hash have 32 bits of a key: here all have the same ones, and few homes."""
    index = KvIndex(ROOMY, 1)
    alike = [n << 40 | 77 for n in range(1, 60)]
    hashes = {n: n.to_bytes(8, "little") + bytes(24) for n in alike}
    index.apply("p", b"".join(hashes[n] for n in alike[:40]))
    index.apply("q", b"".join(hashes[n] for n in alike[10:50]))
    index.apply("p", b"", b"".join(hashes[n] for n in alike[30:60]))
    index.check()
    assert index.match(b"".join(hashes[n] for n in alike)) == {"p": CachedPrefix(30)}
    assert index.match(b"".join(hashes[n] for n in alike[10:])) == {
        "p": CachedPrefix(20),
        "q": CachedPrefix(40),
    }
    assert index.match(hashes[alike[55]]) == {}
    assert index.statistics().num_keys == 50


def test_a_block_that_is_named_twice_is_there_once():
    index = KvIndex(ROOMY)
    numbers = [*range(50), *range(20, 70), 5, 5, 5]
    index.apply("p", chain(numbers))
    index.check()
    assert index.match(chain(range(80))) == {"p": CachedPrefix(70)}
    assert index.part("p", "device").digest == digest_of(chain(range(70)))
    index.apply("p", b"", chain([69, 69, 68]))
    assert index.match(chain(range(80))) == {"p": CachedPrefix(68)}
    assert index.statistics().num_keys == 68
