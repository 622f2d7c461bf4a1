"""A follower keeps its part of the index equal to what its publisher has, whatever is lost."""

from __future__ import annotations

import random
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.kvcache.digest import digest_of
from xllm.kvcache.follower import ANSWER_S, MAX_KEPT_BYTES, FeedFigures, PublisherFollower
from xllm.kvcache.index import KvIndex
from xllm.kvcache.index_parts import CachedPrefix
from xllm.protocol.bus import BlockEvents, InstanceHeartbeat, SnapshotOfBlocks

NAME = "p"


def block(number):
    return sha256(number.to_bytes(8, "big")).digest()


def chain(numbers):
    return b"".join(map(block, sorted(numbers)))


class Publisher:
    """Says what it has as an instance does; each word once, in order."""

    def __init__(self, incarnation="1"):
        self.incarnation = incarnation
        self.seq = 0
        self.held = set()
        self._told = set()

    def beat(self, says_digest=True):
        self.seq += 1
        stored, removed = self.held - self._told, self._told - self.held
        self._told = set(self.held)
        events = (BlockEvents(chain(stored), chain(removed)),) if stored or removed else ()
        more = {"num_cached": len(self.held), "digest": digest_of(chain(self.held))}
        return InstanceHeartbeat(
            NAME,
            self.incarnation,
            self.seq,
            "ready",
            events=events,
            **(more if says_digest else {}),
        )

    def snapshot(self):
        """The word before it goes out first."""
        beat = self.beat()
        return beat, SnapshotOfBlocks(NAME, self.incarnation, self.seq, chain(self.held))


class Followed:
    """An index with one follower, and time."""

    def __init__(self):
        self.now = 100.0
        self.index = KvIndex(8 << 20)
        self.figures = FeedFigures()
        self.start("1")

    def start(self, incarnation):
        self.follower = PublisherFollower(
            self.index, NAME, incarnation, "device", self.figures, lambda: 0.25
        )

    def hear(self, beat):
        self.follower.word(beat, self.now)

    def wants(self, after_s=0.0):
        self.now += after_s
        return self.follower.wants_snapshot(self.now)

    def has(self, numbers):
        part = self.index.part(NAME, "device")
        assert (part.num_blocks, part.digest) == (len(numbers), digest_of(chain(numbers)))
        self.index.check()
        return self.follower.is_known


def test_a_publisher_that_is_heard_from_its_start_needs_no_snapshot():
    followed, publisher = Followed(), Publisher()
    assert not followed.follower.is_known
    for number in range(5):
        publisher.held.add(number)
        followed.hear(publisher.beat())
        assert followed.has(publisher.held)
    assert not followed.wants(10)
    assert followed.figures.num_gaps == followed.figures.num_asked == 0


def test_a_gap_hides_what_is_known_until_a_snapshot_came_and_keeps_what_comes_meanwhile():
    followed, publisher = Followed(), Publisher()
    publisher.held = set(range(4))
    followed.hear(publisher.beat())
    publisher.held.add(4)
    publisher.beat()  # lost
    publisher.held.add(5)
    followed.hear(publisher.beat())
    assert followed.index.match(chain([0])) == {}
    assert not followed.wants()
    assert followed.wants(0.3)
    followed.follower.asked(followed.now, reached=True)
    assert not followed.wants(1.0)
    assert followed.follower.is_asked(followed.now)
    lost_too, answer = publisher.snapshot()
    publisher.held.remove(0)
    later = publisher.beat()
    followed.hear(later)
    followed.follower.snapshot(answer, followed.now)
    assert followed.has(publisher.held)
    assert not followed.follower.is_asked(followed.now)
    followed.hear(lost_too)
    assert followed.has(publisher.held)
    assert followed.figures.num_gaps == followed.figures.num_resyncs == 1


def test_words_in_a_wrong_order_heal_without_a_question():
    followed, publisher = Followed(), Publisher()
    beats = []
    for number in range(5):
        publisher.held = {number, number + 1}
        beats.append(publisher.beat())
    for at in (0, 2, 3, 2, 1):
        followed.hear(beats[at])
    assert followed.follower.is_known
    followed.hear(beats[4])
    assert followed.has({4, 5})
    assert (followed.figures.num_healed, followed.figures.num_asked) == (1, 0)
    assert followed.figures.num_repeated == 1
    assert not followed.wants(10)


def test_no_answer_is_asked_for_again_and_a_question_that_was_not_sent_soon():
    followed, publisher = Followed(), Publisher()
    publisher.beat()
    followed.hear(publisher.beat())
    assert followed.wants(0.3)
    followed.follower.asked(followed.now, reached=False)
    assert not followed.wants(0.1)
    assert followed.wants(0.2)
    followed.follower.asked(followed.now, reached=True)
    assert not followed.wants(ANSWER_S)
    assert followed.wants(0.3)


def test_a_digest_that_differs_leads_to_a_snapshot_and_again_ever_later():
    followed, publisher = Followed(), Publisher()
    publisher.held = {1, 2}
    followed.hear(publisher.beat())
    waits = []
    for _ in range(5):
        publisher._told ^= {2}  # it forgets to tell of one block
        publisher.held ^= {2}
        followed.hear(publisher.beat())
        assert not followed.follower.is_known
        waited = 0.0
        while not followed.wants(0.25):
            waited += 0.25
        waits.append(waited)
        followed.follower.snapshot(publisher.snapshot()[1], followed.now)
        assert followed.has(publisher.held)
    assert followed.figures.num_mismatches == 5
    assert waits == sorted(waits)
    assert waits[-1] > 4 > waits[0]


def test_who_says_no_digest_is_believed():
    followed, publisher = Followed(), Publisher()
    publisher.held = {1}
    followed.hear(publisher.beat(says_digest=False))
    assert followed.has({1})


def test_another_incarnation_begins_with_nothing_and_old_words_do_not_count():
    followed, old = Followed(), Publisher("1")
    old.held = {1, 2}
    followed.hear(old.beat())
    followed.start("2")
    followed.hear(old.beat())
    followed.follower.snapshot(old.snapshot()[1], followed.now)
    assert not followed.follower.is_known
    fresh = Publisher("2")
    fresh.held = {3}
    followed.hear(fresh.beat())
    assert followed.has({3})
    assert followed.figures.num_ignored == 1


def test_words_without_events_are_bounded_too():
    """Heard by one way and not to be asked by the other: heartbeats are kept for no hours."""
    one, other = Publisher(), Followed()
    one.beat()
    for _ in range(200):
        other.hear(msgspec.structs.replace(one.beat(), metrics=bytes(1 << 18)))
        kept = other.follower._kept.values()
        assert sum(len(word.metrics) for word in kept) <= MAX_KEPT_BYTES
    assert other.figures.num_given_up > 1
    for _ in range(20_000):
        other.hear(one.beat())
        assert len(other.follower._kept) <= MAX_KEPT_BYTES >> 10
    beat, snapshot = one.snapshot()
    other.hear(beat)
    other.follower.snapshot(snapshot, other.now)
    assert other.follower.is_known
    assert other.follower._kept_bytes == 0


def test_kept_words_are_bounded_and_what_was_given_up_is_asked_for():
    followed, publisher = Followed(), Publisher()
    publisher.beat()
    many = bytes(32) * (MAX_KEPT_BYTES // 96)
    for _ in range(4):
        publisher.seq += 1
        events = (BlockEvents(many),)
        followed.hear(InstanceHeartbeat(NAME, "1", publisher.seq, "ready", events=events))
    assert followed.figures.num_given_up == 1
    publisher.seq -= 1
    followed.follower.snapshot(publisher.snapshot()[1], followed.now)
    old = SnapshotOfBlocks(NAME, "1", publisher.seq - 1, b"")
    followed.follower.snapshot(old, followed.now)
    assert followed.follower.is_known
    followed.start("1")
    for seq in (5, 9):
        followed.hear(InstanceHeartbeat(NAME, "1", seq, "ready"))
    followed.follower.snapshot(SnapshotOfBlocks(NAME, "1", 6, b""), followed.now)
    assert not followed.follower.is_known
    assert followed.wants(0.3)


@pytest.mark.parametrize("events", [BlockEvents(b"x"), BlockEvents(block(1), b"", "tape")])
def test_events_that_cannot_be_are_counted_and_lead_to_a_snapshot(events):
    followed, publisher = Followed(), Publisher()
    followed.hear(InstanceHeartbeat(NAME, "1", 1, "ready", events=(events,)))
    assert not followed.follower.is_known
    assert followed.figures.num_bad == 1
    publisher.seq = 1
    publisher.held = {7}
    assert followed.wants(0.3)
    followed.follower.snapshot(publisher.snapshot()[1], followed.now)
    assert followed.has({7})


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("change"), st.sets(st.integers(0, 30), max_size=6)),
        st.tuples(st.just("beat"), st.sampled_from(["ok", "lost", "twice", "late"])),
        st.tuples(st.just("time"), st.sampled_from([0.1, 0.5, 3.0])),
        st.tuples(st.just("answer"), st.sampled_from(["now", "late", "lost"])),
        st.tuples(st.just("restart"), st.sampled_from(["publisher", "router"])),
        st.tuples(st.just("forgets"), st.integers(0, 30)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(0, 1 << 30))
def test_any_loss_order_restart_and_race_leaves_no_divergence(steps, seed):
    """Lost, doubled, late words and answers, restarts on either side, blocks that were not told:
    once the words come again, the index is what the publisher has; while it is known, it always
    was what the publisher had at that number."""
    rng = random.Random(seed)
    followed, publisher = Followed(), Publisher()
    had = {("1", 0): set()}
    words, answers = [], []
    num_lives = 1
    forgot = False

    def note(beat):
        had[publisher.incarnation, publisher.seq] = set(publisher.held)
        return beat

    def hear(beat):
        nonlocal forgot
        followed.hear(beat)
        follower = followed.follower
        if follower.is_known and not forgot:
            assert followed.has(had[follower.incarnation, follower.seq])

    for kind, value in steps:
        if kind == "change":
            publisher.held ^= value
        elif kind == "forgets":
            # A block that comes and is never told of.
            publisher.held ^= {value}
            publisher._told ^= {value}
            forgot = True
        elif kind == "time":
            followed.now += value
        elif kind == "restart" and value == "router":
            followed = Followed()
            followed.start(publisher.incarnation)
            words, answers = [], []
        elif kind == "restart":
            num_lives += 1
            publisher = Publisher(str(num_lives))
            had[publisher.incarnation, 0] = set()
            followed.start(publisher.incarnation)
        elif kind == "beat":
            beat = note(publisher.beat())
            if value in ("ok", "twice"):
                hear(beat)
            if value in ("late", "twice"):
                words.append(beat)
            if words and rng.random() < 0.5:
                hear(words.pop(rng.randrange(len(words))))
        elif kind == "answer" and followed.wants():
            followed.follower.asked(followed.now, reached=True)
            beat, answer = publisher.snapshot()
            note(beat)
            hear(beat) if rng.random() < 0.5 else words.append(beat)
            if value == "now":
                followed.follower.snapshot(answer, followed.now)
            elif value == "late":
                answers.append(answer)
            if answers and rng.random() < 0.5:
                followed.follower.snapshot(answers.pop(), followed.now)
    for word in words:
        hear(word)
    for answer in answers:
        followed.follower.snapshot(answer, followed.now)
    for _ in range(40):
        hear(note(publisher.beat()))
        followed.now += 2.0
        if followed.wants():
            followed.follower.asked(followed.now, reached=True)
            beat, answer = publisher.snapshot()
            note(beat)
            followed.follower.snapshot(answer, followed.now)
    assert followed.has(publisher.held)
    assert followed.index.match(block(30)) == (
        {NAME: CachedPrefix(1)} if 30 in publisher.held else {}
    )
