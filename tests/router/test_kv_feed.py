"""The router's indices: who is followed, what is asked, what requests found, what is amiss."""

from __future__ import annotations

import random
from hashlib import sha256

from prometheus_client import CollectorRegistry, generate_latest

from tests.router.fake_cluster import FakeCluster, in_loop
from xllm.config.kv_index import KvIndexSettings
from xllm.kvcache.digest import digest_of
from xllm.kvcache.index_parts import CachedPrefix
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import (
    BlockEvents,
    DaemonHeartbeat,
    InstanceHeartbeat,
    RouterPresence,
    SnapshotOfBlocks,
)
from xllm.protocol.instance import RequestEnded, TokenBatch
from xllm.protocol.records import DaemonRecord, InstanceRecord
from xllm.router.kv_feed import DAEMONS, MAX_OPEN_QUESTIONS, KvFeed
from xllm.router.kv_feedback import BROKEN, MAX_PROMISES, SILENT_WORDS, Promises
from xllm.router.kv_metrics import KvFeedMetrics

BLOCK = 4


def chain(*numbers):
    return b"".join(sha256(n.to_bytes(8, "big")).digest() for n in numbers)


def record(name, incarnation="1", model="m"):
    return InstanceRecord(
        name=name,
        incarnation=incarnation,
        endpoint="",
        bus_endpoint="",
        model=model,
        model_path="",
        max_model_len=512,
        vocab_size=330,
        block_size=BLOCK,
        num_blocks=64,
    )


def beat(name, seq, stored=b"", incarnation="1", **more):
    events = (BlockEvents(stored),) if stored else ()
    return InstanceHeartbeat(name, incarnation, seq, "ready", events=events, **more)


class Fed:
    """A feed and its time."""

    def __init__(self, **more):
        self.now = 50.0
        self.feed = KvFeed(
            KvIndexSettings(max_bytes=8 << 20, **more), lambda: self.now, random.Random(3)
        )

    def text(self):
        registry = CollectorRegistry()
        KvFeedMetrics(registry, self.feed)
        return generate_latest(registry).decode()


def test_each_model_has_an_index_and_daemons_are_told_for_all():
    feed = Fed().feed
    feed.instance_registered(record("a"))
    feed.instance_registered(record("b", model="n"))
    daemon = DaemonRecord("d", "1", "", "")
    feed.daemon_registered(daemon)
    feed.heard(beat("a", 1, chain(1, 2)))
    feed.heard(beat("b", 1, chain(1)))
    feed.heard(DaemonHeartbeat("d", "1", 1, events=(BlockEvents(chain(1), tier="dram"),)))
    feed.heard(beat("stranger", 1, chain(1)))
    feed.heard(RouterPresence("r", "1", 1))
    both = chain(1, 2)
    assert feed.match("m", both) == {"a": CachedPrefix(2), "d": CachedPrefix(0, 1)}
    assert feed.match("n", both) == {"b": CachedPrefix(1), "d": CachedPrefix(0, 1)}
    assert feed.match("unheard", both) == {"d": CachedPrefix(0, 1)}
    feed.daemon_registered(daemon)
    assert "d" in feed.match("m", both)
    feed.gone(PeerRole.MASTER, "a")
    feed.gone(PeerRole.DAEMON, "d")
    feed.gone(PeerRole.MASTER, "nobody")
    assert feed.match("m", both) == {}
    assert set(feed.indices) == {"m", "n", DAEMONS}


def dram_beat(name, seq, stored, incarnation="1", **more):
    return DaemonHeartbeat(
        name, incarnation, seq, events=(BlockEvents(stored, tier="dram"),), **more
    )


def test_a_daemon_that_bears_the_name_of_an_instance_tells_nothing_of_it():
    feed = Fed().feed
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1, chain(1)))
    feed.daemon_registered(DaemonRecord("a", "1", "", ""))
    # The instance's incarnation and number, as one who listens knows them.
    feed.heard(dram_beat("a", 2, chain(1, 2, 3), num_cached=9, digest=5))
    assert feed.match("m", chain(1, 2, 3)) == {"a": CachedPrefix(1)}
    assert feed.match("n", chain(1, 2, 3)) == {}
    feed.snapshot(PeerRole.DAEMON, "a", SnapshotOfBlocks("a", "1", 9, chain(1, 2, 3)))
    feed.heard(beat("a", 2, chain(2)))
    assert feed.match("m", chain(1, 2, 3)) == {"a": CachedPrefix(2)}
    feed.gone(PeerRole.DAEMON, "a")
    feed.heard(beat("a", 3, chain(3)))
    assert feed.match("m", chain(1, 2, 3)) == {"a": CachedPrefix(3)}


def test_an_instance_and_a_daemon_of_one_name_are_both_followed():
    feed = Fed(jitter_ms=0).feed
    daemon = DaemonRecord("n1", "7", "", "")
    feed.daemon_registered(daemon)
    feed.heard(dram_beat("n1", 1, chain(1, 2), "7"))
    feed.instance_registered(record("n1"))
    assert set(feed.followers) == {(PeerRole.DAEMON, "n1"), (PeerRole.MASTER, "n1")}
    feed.heard(beat("n1", 1, chain(1)))
    feed.daemon_registered(daemon)
    assert feed.match("m", chain(1, 2)) == {"n1": CachedPrefix(1)}
    feed.heard(dram_beat("n1", 5, chain(3), "7"))
    assert feed.num_unknown == 1
    assert list(feed.to_ask()) == [(PeerRole.DAEMON, "n1")]
    assert feed.match("m", chain(1, 2)) == {"n1": CachedPrefix(1)}
    answer = SnapshotOfBlocks("n1", "7", 5, chain(1, 2, 3), tier="dram")
    feed.snapshot(PeerRole.MASTER, "n1", answer)
    assert feed.num_unknown == 1
    feed.snapshot(PeerRole.DAEMON, "n1", answer)
    assert feed.num_unknown == 0
    feed.gone(PeerRole.MASTER, "n1")
    assert feed.match("m", chain(1, 2, 3)) == {"n1": CachedPrefix(0, 3)}


def test_another_incarnation_begins_anew():
    feed = Fed().feed
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1, chain(1)))
    feed.instance_registered(record("a", "2"))
    feed.heard(beat("a", 2, chain(2)))
    assert feed.match("m", chain(1)) == {}
    feed.heard(beat("a", 1, chain(3), "2"))
    assert feed.match("m", chain(3)) == {"a": CachedPrefix(1)}


def test_few_questions_are_open_at_once_and_answers_make_room():
    fed = Fed(jitter_ms=0)
    feed = fed.feed
    names = [f"i{n}" for n in range(MAX_OPEN_QUESTIONS + 4)]
    for name in names:
        feed.instance_registered(record(name))
        feed.heard(beat(name, 7))
    asked = list(feed.to_ask())
    assert len(asked) == MAX_OPEN_QUESTIONS
    for publisher in asked:
        feed.asked(publisher, True)
    assert list(feed.to_ask()) == []
    assert feed.num_unknown == len(names)
    told = {name for _, name in asked}
    for name in told:
        feed.snapshot(PeerRole.MASTER, name, SnapshotOfBlocks(name, "1", 7, chain(1)))
    feed.snapshot(PeerRole.MASTER, "nobody", SnapshotOfBlocks("nobody", "1", 7, chain(1)))
    assert set(feed.to_ask()) == {(PeerRole.MASTER, name) for name in set(names) - told}
    assert set(feed.match("m", chain(1))) == told


def test_who_stays_unknown_is_named():
    fed = Fed()
    fed.feed.instance_registered(record("a"))
    fed.feed.heard(beat("a", 7))
    assert fed.feed.alarms() == ()
    fed.now += 6
    assert fed.feed.alarms() == ("what a has cached is unknown",)
    assert "xllm_kv_index_unknown_publishers 1.0" in fed.text()


def test_an_instance_that_computes_and_does_not_tell_is_silent_until_it_does():
    fed = Fed()
    feed = fed.feed
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1))
    for number in range(4):
        feed.ended("a", RequestEnded(f"r{number}", 1), 8 * BLOCK)
        feed.ended("a", RequestEnded(f"s{number}", 1), BLOCK - 1)
    for seq in range(2, 2 + SILENT_WORDS):
        assert feed.alarms() == ()
        feed.heard(beat("a", seq))
    assert feed.alarms() == ("instance a tells nothing of its cache",)
    assert "xllm_kv_index_silent_instances 1.0" in fed.text()
    feed.heard(beat("a", seq + 1, chain(1)))
    assert feed.alarms() == ()


def test_an_instance_that_tells_is_not_silent():
    feed = Fed().feed
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1, chain(1)))
    for number in range(40):
        feed.ended("a", RequestEnded(f"r{number}", 1), 8 * BLOCK)
        feed.heard(beat("a", 2 + number))
    assert feed.alarms() == ()


def test_promises_that_are_broken_again_and_again_lead_to_a_snapshot():
    fed = Fed(jitter_ms=0)
    feed = fed.feed
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1, chain(1)))
    for number in range(BROKEN):
        assert feed.num_unknown == 0
        feed.placed(f"r{number}", "a", 100)
        feed.ended("a", RequestEnded(f"r{number}", 1, cached_tokens=0), 400)
    assert feed.num_unknown == 1
    assert feed.figures.num_distrusted == 1
    assert list(feed.to_ask()) == [(PeerRole.MASTER, "a")]
    assert f"xllm_kv_index_over_tokens_total {BROKEN * 400}.0" in fed.text()


def test_promises_that_are_about_right_are_only_counted():
    feed = Fed().feed
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1, chain(1)))
    for number in range(50):
        feed.placed(f"r{number}", "a", 10)
        feed.ended("a", RequestEnded(f"r{number}", 1, cached_tokens=36), 40)
        feed.placed(f"s{number}", "a", 0)
        feed.ended("a", RequestEnded(f"s{number}", 1, cached_tokens=16), 40)
    counts = feed.promises.figures
    assert (counts.num_promises, counts.promised_tokens, counts.found_tokens) == (100, 2000, 2600)
    assert (counts.over_tokens, counts.under_tokens, counts.num_broken) == (200, 800, 0)
    assert feed.num_unknown == 0


def test_a_promise_counts_for_the_instance_that_it_was_made_of():
    promises = Promises()
    promises.promise("r", "a", 100)
    promises.promise("r", "b", 0)
    assert not promises.found("r", "a", 0, BLOCK)
    assert not promises.found("r", "b", 0, BLOCK)
    assert promises.figures.num_promises == 0
    for number in range(MAX_PROMISES + 5):
        promises.promise(str(number), "a", 1)
    promises.found("0", "a", 1, BLOCK)
    assert promises.figures.num_promises == 0
    promises.found("5", "a", 1, BLOCK)
    assert promises.figures.num_promises == 1


def test_without_an_index_nothing_is_known_and_nothing_breaks():
    feed = KvFeed(KvIndexSettings(max_bytes=0), lambda: 0.0)
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1, chain(1)))
    feed.snapshot(PeerRole.MASTER, "a", SnapshotOfBlocks("a", "1", 1))
    feed.placed("r", "a", 1)
    feed.ended("a", RequestEnded("r", 1), 100)
    assert feed.match("m", chain(1)) == {}
    assert list(feed.to_ask()) == []
    assert feed.alarms() == ()


def test_a_digest_that_fits_is_accepted_over_the_bus():
    feed = Fed().feed
    feed.instance_registered(record("a"))
    feed.heard(beat("a", 1, chain(1, 2), num_cached=2, digest=digest_of(chain(2, 1))))
    assert feed.num_unknown == 0
    feed.heard(beat("a", 2, num_cached=1, digest=digest_of(chain(2))))
    assert feed.num_unknown == 1
    assert feed.figures.num_mismatches == 1


@in_loop
async def test_a_prefix_aware_router_promises_and_hears_what_was_found():
    cluster = FakeCluster("a", "b", policy="prefix-aware")
    feed = cluster.service.kv
    for name in ("a", "b"):
        feed.instance_registered(cluster.service.view.get(name).record)
    request_id, _ = cluster.ask("hello, this is a prompt of several blocks")
    (admitted,) = cluster.links.admits()
    first = cluster.links.sent[-1][0]
    feed.heard(beat(first, 1, admitted.block_hashes))
    cluster.service.abort(request_id)
    cluster.clock.now += 5
    for name in ("a", "b"):
        cluster.beat(name)
    second_id, _ = cluster.ask("hello, this is a prompt of several blocks")
    instance = next(name for name, word in reversed(cluster.links.sent) if word.attempt == 1)
    assert instance == first
    cached = len(admitted.block_hashes) // 32 * 4
    ended = RequestEnded(second_id, 1, cached_tokens=cached - 4)
    cluster.service.instance_says(instance, TokenBatch((), (ended,)))
    assert feed.promises.figures.promised_tokens == cached
    assert feed.promises.figures.found_tokens == cached - 4
    assert b"xllm_kv_index_promised_tokens_total" in cluster.service.metrics_text()
    cluster.service.abort(second_id)
    cluster.close()
