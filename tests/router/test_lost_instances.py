"""The service over fakes whose instances are lost, silent, full or leaving: where requests go."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.fake_cluster import FakeCluster, in_loop, text_model
from xllm.protocol.generation import RequestFailed, RequestFinished
from xllm.router.state.move_budget import MOVE_BURST
from xllm.router.state.moves import PATIENCE_S
from xllm.router.state.request import RequestLife


@in_loop
async def test_requests_of_a_lost_instance_go_on_elsewhere():
    cluster = FakeCluster("a", "b")
    asked = [cluster.ask(max_tokens=30) for _ in range(4)]
    there = {word.request_id: name for name, word in cluster.links.sent}
    assert sorted(there.values()) == ["a", "a", "b", "b"]
    for request_id, _ in asked:
        cluster.say(request_id, 0, "hello")
    cluster.links.unreachable.add("a")
    cluster.change(cluster.service.view.disconnected("a"))
    moved = [word for _, word in cluster.links.sent[4:]]
    assert sorted(word.request_id for word in moved) == sorted(
        request_id for request_id, name in there.items() if name == "a"
    )
    assert all(
        word.attempt == 2 and word.outputs == (tuple(text_model().encode("hello")),)
        for word in moved
    )
    for request_id, sink in asked:
        attempt = 2 if there[request_id] == "a" else 1
        count = len(text_model().encode("hello"))
        cluster.say(request_id, count, " world", "length", attempt)
        cluster.end(request_id, attempt)
        assert sink.text == "hello world"
    assert cluster.service.metrics.num_moves == 2
    assert all(one.num_inflight == 0 for one in cluster.service.view)
    cluster.close()


@in_loop
async def test_a_request_waits_for_its_only_instance_to_come_back():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask(max_tokens=5)
    cluster.change(cluster.service.view.disconnected("a"))
    cluster.tick()
    assert not sink.messages
    statistics = cluster.service.dispatcher.statistics()
    assert (statistics.num_open, statistics.num_homeless) == (1, 1)
    cluster.join("a", "2")
    assert [word.attempt for word in cluster.links.admits()] == [1, 2]
    cluster.say(request_id, 0, "a", "length", 2)
    cluster.end(request_id, 2)
    assert isinstance(sink.last, RequestFinished)
    cluster.close()


@in_loop
async def test_a_refusing_instance_is_asked_again_after_its_next_heartbeat():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask(max_tokens=5)
    cluster.say(request_id, 0, "a")
    cluster.end(request_id, code="unavailable")
    for _ in range(20):
        cluster.clock.now += 0.01
        cluster.tick()
    _, refused = cluster.ask()
    assert refused.last.code == "unavailable"
    cluster.beat("a", state="loading")
    assert len(cluster.links.admits()) == 1
    cluster.beat("a")
    cluster.say(request_id, 1, "b", "length", 2)
    cluster.end(request_id, 2)
    assert sink.text == "ab"
    assert isinstance(sink.last, RequestFinished)
    cluster.close()


@in_loop
async def test_a_silent_instance_keeps_its_requests_until_there_is_a_better_place():
    cluster = FakeCluster("a")
    request_id, sink = cluster.ask(max_tokens=9)
    cluster.say(request_id, 0, "a")
    for _ in range(9):
        cluster.clock.now += 0.1
        cluster.tick()
    assert [one.suspect for one in cluster.service.view] == [True]
    cluster.say(request_id, 1, "b")  # it was only slow
    cluster.join("b")
    [first, second] = cluster.links.admits()
    assert (first.attempt, second.attempt, len(second.outputs[0])) == (1, 2, 2)
    assert cluster.links.sent[-1][0] == "b"
    cluster.say(request_id, 2, "c", "length", 2)
    cluster.end(request_id, 2)
    assert sink.text == "abc"
    cluster.close()


@in_loop
async def test_nobody_comes_back_forever():
    cluster = FakeCluster("a")
    _, sink = cluster.ask()
    cluster.change(cluster.service.view.deregistered("a"))
    cluster.change(cluster.service.view.disconnected("a"))
    cluster.tick()
    for _ in range(40):
        cluster.clock.now += 1
        cluster.tick()
    assert sink.last.code == "unavailable"
    cluster.close()


@in_loop
async def test_an_unreachable_instance_does_not_get_stuck_requests():
    cluster = FakeCluster("a", "b")
    cluster.links.unreachable.add("a")
    for _ in range(2):
        cluster.ask()
    for _ in range(20):
        await asyncio.sleep(0)
    assert {name for name, _ in cluster.links.sent} == {"b"}
    cluster.service.dispatcher.check()
    cluster.close()


@in_loop
async def test_a_fault_in_one_request_does_not_keep_others_where_they_are(monkeypatch):
    cluster = FakeCluster("a", "b")
    asked = [cluster.ask(max_tokens=9) for _ in range(6)]
    there = [cluster.service.dispatcher.open[request_id] for request_id, _ in asked]
    on_a = [one for one in there if one.placed == "a"]
    assert len(on_a) == 3

    def break_down(state, *args, **kwargs):
        if state is on_a[0].state:
            raise RuntimeError("a bug")
        return lose(state, *args, **kwargs)

    lose = RequestLife.instance_lost
    monkeypatch.setattr(RequestLife, "instance_lost", break_down)
    cluster.links.unreachable.add("a")
    cluster.change(cluster.service.view.disconnected("a"))
    sinks = {one: sink for one, (_, sink) in zip(there, asked, strict=True)}
    assert sinks[on_a[0]].last.code == "internal_error"
    assert [one.placed for one in on_a[1:]] == ["b", "b"]
    cluster.close()


@in_loop
async def test_a_session_goes_to_one_instance_and_survives_its_end():
    cluster = FakeCluster("a", "b", "c")
    for _ in range(6):
        cluster.ask(session="talk")
    homes = {name for name, _ in cluster.links.sent}
    assert len(homes) == 1
    [home] = homes
    cluster.links.unreachable.add(home)
    cluster.change(cluster.service.view.disconnected(home))
    second = {name for name, _ in cluster.links.sent[6:]}
    assert len(second) == 1
    assert second != homes
    assert all(word.attempt == 2 for _, word in cluster.links.sent[6:])
    _, sink = cluster.ask(session="x" * 257)
    assert (sink.last.code, sink.last.param) == ("invalid_value", "session")
    cluster.close()


@in_loop
async def test_a_draining_refusing_or_silent_instance_is_never_chosen():
    for harm in ("draining", "refusing", "suspect", "disconnected"):
        cluster = FakeCluster("a", "b", policy="prefix-aware")
        if harm == "draining":
            cluster.beat("a", state="draining")
        elif harm == "refusing":
            cluster.service.view.refused("a")
        elif harm == "suspect":
            for _ in range(9):
                cluster.clock.now += 0.1
                cluster.beat("b")
                cluster.tick()
        else:
            cluster.change(cluster.service.view.disconnected("a"))
        for _ in range(5):
            cluster.ask(session="talk")
            cluster.ask()
        assert {name for name, _ in cluster.links.sent} == {"b"}, harm
        cluster.close()


@in_loop
async def test_a_first_move_is_free_and_further_ones_wait_for_the_budget():
    cluster = FakeCluster("a", "b")
    num = int(MOVE_BURST) + 100
    asked = [cluster.ask(max_tokens=5) for _ in range(num)]

    def lose_all(attempt):
        for request_id, _ in asked:
            cluster.say(request_id, 9, "x", attempt=attempt)  # tokens before it are missing

    lose_all(1)  # everyone's first move goes through, budget or not
    assert len(cluster.links.admits()) == 2 * num
    assert cluster.service.metrics.num_held_back == 0
    lose_all(2)
    moved = len(cluster.links.admits()) - 2 * num
    assert int(MOVE_BURST) <= moved < num
    assert cluster.service.metrics.num_held_back == num - moved
    assert b"xllm_router_moves_held_back_total{" in cluster.service.metrics_text()
    for _ in range(100):  # everybody's turn comes, with time
        cluster.clock.now += 0.1
        for name in ("a", "b"):
            cluster.beat(name)
        cluster.tick()
    assert len(cluster.links.admits()) == 3 * num
    assert not any(sink.done.is_set() for _, sink in asked)
    for request_id, _ in asked:
        cluster.service.abort(request_id)
    assert all(isinstance(sink.last, RequestFailed) for _, sink in asked)
    cluster.close()


@in_loop
async def test_a_move_is_not_held_back_forever():
    cluster = FakeCluster("a", "b")
    request_id, sink = cluster.ask(max_tokens=5)
    for attempt in (1, 2):
        cluster.service.dispatcher._budget.left = -1e9
        cluster.say(request_id, 9, "x", attempt=attempt)
    assert len(cluster.links.admits()) == 2
    for _ in range(8):
        assert not sink.done.is_set()
        cluster.clock.now += PATIENCE_S / 8 + 0.1
        for name in ("a", "b"):
            cluster.beat(name)
        cluster.tick()
    cluster.clock.now += 0.1
    cluster.tick()
    assert sink.last.code == "unavailable"
    cluster.close()


@pytest.mark.parametrize(
    ("why", "everywhere"),
    [("none", False), ("stops", False), ("line", False), ("asleep", True), ("lost", False)],
)
@in_loop
async def test_a_refusal_says_whether_another_router_may_have_a_better_answer(why, everywhere):
    cluster = FakeCluster(timeout_s=100.0)
    if why in ("asleep", "lost", "stops"):
        cluster.join("a")
    elif why == "line":
        cluster.register("a")  # it may come yet
    if why == "asleep":
        cluster.beat("a", state="asleep")
    cluster.service.submission.draining = why == "stops"
    _, sink = cluster.ask()
    if why == "lost":
        assert len(cluster.links.admits()) == 1
        cluster.change(cluster.service.view.disconnected("a"))
    assert sink.done.is_set() == (why not in ("line", "lost"))
    for _ in range(2):  # one tick notes that it waits
        cluster.clock.now += PATIENCE_S + 1
        cluster.tick()
        cluster.service.admission.tick()
    assert (sink.last.code, sink.last.everywhere) == ("unavailable", everywhere)
    cluster.close()
