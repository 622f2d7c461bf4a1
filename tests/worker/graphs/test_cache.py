"""Graphs by key: when they are captured, given up, and what a failure does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.graphs.fake_graphs import FakeGraphs
from xllm.worker.graphs.cache import GraphCache


def make(max_graphs=2, capture_at=1, **fields):
    device = FakeGraphs(**fields)
    return device, GraphCache(device, max_graphs, capture_at)


def test_a_body_is_captured_once_and_replayed_each_time():
    device, cache = make()
    calls = []
    for _ in range(3):
        assert cache.is_open("a")
        assert cache.run("a", lambda: calls.append(1))
    assert device.num_captures == 1
    assert len(calls) == 3  # the capture was the first time
    found = cache.statistics()
    assert (found.num_graphs, found.num_replays, found.num_captures) == (1, 2, 1)


def test_a_key_is_captured_when_it_comes_again():
    _, cache = make(capture_at=2)
    assert not cache.is_open("a")
    assert not cache.is_open("b")
    assert cache.is_open("a")


def test_a_failed_capture_is_not_tried_again_and_leaves_the_others():
    device, cache = make(failing={"bad"})
    assert cache.run("good", device.body("good"))
    assert not cache.run("bad", device.body("bad"))
    assert not cache.is_open("bad")
    assert not cache.run("bad", device.body("bad"))
    assert device.num_failures == 1
    assert cache.statistics().num_failed == 1
    assert cache.run("good", device.body("good"))


def test_the_graph_not_used_for_longest_goes_and_can_come_back():
    device, cache = make(max_graphs=2)
    for key in ("a", "b", "a", "c"):
        assert cache.run(key, device.body(key))
    assert cache.statistics().num_evicted == 1
    assert [graph.name for graph in device.open_graphs()] == ["a", "c"]
    assert cache.run("b", device.body("b"))
    assert device.num_captures == 4


def test_a_keys_parts_come_and_go_together():
    device, gone = FakeGraphs(), []
    cache = GraphCache(device, 2, 1, gone.append)
    for key in ("a", "b"):
        for part in range(3):
            assert cache.run(key, device.body(f"{key}{part}"), part)
    assert cache.statistics().num_graphs == 6
    assert cache.run("c", device.body("c0"))
    assert gone == ["a"]
    assert [graph.name for graph in device.open_graphs()] == ["b0", "b1", "b2", "c0"]


def test_a_part_that_fails_leaves_the_others_graphs():
    device, cache = make(failing={"a1"})
    for _ in range(2):
        assert [cache.run("a", device.body(f"a{part}"), part) for part in range(3)] == [
            True, False, True,
        ]  # fmt: skip
    assert cache.is_open("a")
    assert device.num_failures == 1


def test_whatever_a_body_raises_it_is_run_eagerly_from_then_on():
    def broken():
        raise ZeroDivisionError("no such kernel")

    _, cache = make()
    assert not cache.run("a", broken)
    assert not cache.is_open("a")


def test_close_gives_all_graphs_up():
    device, cache = make(max_graphs=4)
    for key in "abc":
        cache.run(key, device.body(key))
    cache.close()
    assert device.open_graphs() == []
    assert cache.statistics().num_graphs == 0


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_never_more_graphs_than_allowed_and_each_run_has_its_effect(keys, most, capture_at):
    device, cache = make(max_graphs=most, capture_at=capture_at, failing={"3"})
    place: list = []  # what every body writes to, as a graph does to its tensors
    for key in keys:
        place.clear()
        body = device.body(str(key), lambda key=key: place.append(key))
        if not (cache.is_open(str(key)) and cache.run(str(key), body)):
            body()
        assert place[-1] == key
        assert len(device.open_graphs()) == cache.statistics().num_graphs <= most


def test_sights_of_keys_are_bounded():
    _, cache = make(max_graphs=1, capture_at=2)
    for key in range(100):
        assert not cache.is_open(key)
    assert not cache.is_open(0)  # forgotten among so many
    assert cache.is_open(99)


def test_captures_take_their_share_of_the_time_and_the_parts_of_a_key_all_the_same():
    now = [0.0]

    class Slow(FakeGraphs):
        def capture(self, run):
            now[0] += 1.0
            return super().capture(run)

    device = Slow()
    cache = GraphCache(device, 8, 1, clock=lambda: now[0])
    for key in "ab":  # before it is bounded
        assert cache.is_open(key)
        assert cache.run(key, lambda: None)
    cache.bound_captures(0.1)
    assert cache.is_open("c")
    for part in range(3):
        assert cache.run("c", lambda: None, part)
    assert device.num_captures == 5
    # Three seconds of captures: nothing more for 27.
    now[0] = 5.0 + 26.9
    assert not cache.is_open("d")
    assert cache.is_open("a")  # it is there
    assert cache.statistics().num_deferred == 1
    now[0] += 0.2
    assert cache.is_open("d")


def test_captures_that_fail_are_paid_for():
    now = [0.0]

    def slow_and_broken():
        now[0] += 2.0
        raise ZeroDivisionError

    cache = GraphCache(FakeGraphs(), 8, 1, clock=lambda: now[0])
    cache.bound_captures(0.5)
    assert not cache.run("a", slow_and_broken)
    assert not cache.is_open("b")
    now[0] += 2.1
    assert cache.is_open("b")


def test_a_cache_holds_at_least_one():
    with pytest.raises(AssertionError):
        make(max_graphs=0)
