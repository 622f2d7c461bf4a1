"""What counts as growth, and the counts that processes give of themselves."""

from __future__ import annotations

import json

from xllm.cli.chaos.growth import MOST_RSS_KB, Snapshot, compare_sizes, read_objects
from xllm.cli.chaos.processes import ProcessSize
from xllm.protocol.actor.fault_hooks import objects_file, write_objects


def snapshot(pid=1, rss_kb=10_000, num_threads=3, num_fds=20, **objects):
    counts = {"total": sum(objects.values()), **objects}
    return Snapshot(pid, ProcessSize(rss_kb, num_threads, num_fds), counts)


def test_what_stays_as_it_was_is_fine():
    before = {"a": snapshot(dict=1000)}
    found = compare_sizes(before, {"a": snapshot(rss_kb=10_000 + MOST_RSS_KB, dict=1100)})
    assert found["too_much"] == []
    assert found["processes"]["a"]["objects_grown"] == 100


def test_each_kind_of_growth_is_named():
    before = {"a": snapshot(dict=1000)}
    after = {"a": snapshot(rss_kb=13_000, num_threads=4, num_fds=40, dict=1500)}
    assert compare_sizes(before, after)["too_much"] == [
        "a grew by 3000 kB, not at most 2048",
        "a has 20 more descriptors",
        "a has 1 more threads",
        "a has 500 more objects of dict",
    ]


def test_a_process_that_was_started_again_is_not_compared():
    found = compare_sizes({"a": snapshot(pid=1)}, {"a": snapshot(pid=2, rss_kb=90_000)})
    assert found == {"processes": {}, "too_much": []}


def test_a_process_that_does_not_answer_is_no_proof():
    silent = Snapshot(1, ProcessSize(1, 1, 1), {})
    assert compare_sizes({"a": silent}, {"a": silent})["too_much"] == [
        "a did not count its objects"
    ]


def test_objects_are_counted(tmp_path):
    class Marked:
        pass

    kept = [Marked() for _ in range(5000)]
    write_objects(str(tmp_path / objects_file("instance-0/worker-0")))
    found = read_objects(tmp_path, "instance-0/worker-0")
    assert found["total"] > 0
    assert found[Marked.__qualname__] == len(kept)
    assert read_objects(tmp_path, "other") == {}
    (tmp_path / objects_file("half")).write_text(json.dumps({"a": 1})[:3])
    assert read_objects(tmp_path, "half") == {}
