"""What heartbeats and snapshots say of a real scheduler's cache, together, is what it has."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.toy_instance import ToyInstance
from xllm.kvcache.digest import digest_of
from xllm.kvcache.follower import FeedFigures, PublisherFollower
from xllm.kvcache.hashing import HASH_BYTES
from xllm.kvcache.index import KvIndex
from xllm.master.heartbeat import HeartbeatMaker
from xllm.master.metrics import MasterMetrics
from xllm.protocol.bus import SnapshotOfBlocks

NAME = "i0"


class Telling:
    """An instance whose cache is small, and a router that follows it."""

    def __init__(self) -> None:
        self.maker = HeartbeatMaker(NAME, "1", MasterMetrics())
        self.instance = self.fresh_instance()
        self.index = KvIndex(4 << 20)
        self.figures = FeedFigures()
        self.follower = PublisherFollower(
            self.index, NAME, "1", "device", self.figures, lambda: 0.0
        )
        self.now = 10.0
        self.num_admitted = 0

    def fresh_instance(self) -> ToyInstance:
        return ToyInstance(num_blocks=24)

    def beat(self, lost=False):
        word = self.maker.make("ready", "both", self.instance.scheduler, b"")
        if not lost:
            self.follower.word(word, self.now)

    def answer(self):
        """As a served model does: the word before it goes out first."""
        self.beat(lost=True)
        hashes = self.instance.scheduler.snapshot_blocks()
        return SnapshotOfBlocks(NAME, "1", self.maker.seq, hashes)

    def lose_worker(self):
        self.maker.forget_blocks(self.instance.scheduler)
        self.instance = self.fresh_instance()

    def admit(self, rng):
        prompt = [20 + rng.randrange(3)] * 4 * rng.randrange(1, 6) + list(range(20, 30))
        self.instance.admit(f"r{self.num_admitted}", prompt[: rng.randrange(1, 30)], max_tokens=6)
        self.num_admitted += 1

    def check(self):
        """The index is what the cache is."""
        held = self.instance.scheduler.snapshot_blocks()
        part = self.index.part(NAME, "device")
        assert self.follower.is_known
        assert part.num_blocks == len(held) // HASH_BYTES
        assert part.digest == digest_of(held)
        self.index.check()


STEPS = st.lists(
    st.sampled_from(
        ["admit", "admit", "step", "step", "beat", "beat", "lost beat", "snapshot", "worker"]
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(0, 1 << 30))
def test_no_event_is_lost_or_doubled_between_words_and_snapshots(steps, seed):
    rng = random.Random(seed)
    telling = Telling()
    answers = []
    for step in steps:
        if step == "admit":
            telling.admit(rng)
        elif step == "step":
            telling.instance.step()
        elif step == "worker":
            telling.lose_worker()
        elif step == "snapshot":
            answers.append(telling.answer())
            if rng.random() < 0.5:
                telling.follower.snapshot(answers.pop(0), telling.now)
        else:
            telling.beat(lost=step == "lost beat")
    for answer in answers:
        telling.follower.snapshot(answer, telling.now)
    telling.beat()
    if not telling.follower.is_known:
        telling.follower.snapshot(telling.answer(), telling.now)
    telling.beat()
    telling.check()
    assert telling.figures.num_mismatches == 0


def test_a_cache_under_pressure_is_told_block_by_block():
    """Far more prompts than blocks: what is evicted between two heartbeats is in neither."""
    rng = random.Random(2)
    telling = Telling()
    for number in range(200):
        telling.admit(rng)
        telling.instance.step()
        if number % 3 == 0:
            telling.beat()
            telling.check()
    evicted = telling.instance.scheduler.statistics()
    assert evicted.num_blocks == 24
    assert telling.index.statistics().num_events > 200
    assert telling.figures.num_asked == telling.figures.num_gaps == 0
