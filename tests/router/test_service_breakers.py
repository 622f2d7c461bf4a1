"""Breakers of instances, in a router's service over fakes."""

from __future__ import annotations

import pytest

from tests.router.admission_cluster import ask, close, cluster_with, metrics, sent_to
from tests.router.fake_cluster import in_loop


@in_loop
async def test_an_instance_that_fails_requests_is_left_alone_and_tried_again():
    cluster = cluster_with("a", "b", breaker_failures=2, breaker_open_s=5)

    def fail_at(name: str) -> None:
        while True:
            request_id, sink = ask(cluster)
            where = cluster.links.sent[-1][0]
            if where == name:
                cluster.end(request_id, code="engine_error")
                assert sink.last.code == "engine_error"
                return
            cluster.say(request_id, 0, "a", "length")
            cluster.end(request_id)

    for _ in range(2):
        fail_at("a")
        cluster.clock.now += 0.5
    found = {one.name: one.breaker for one in cluster.service.status().processes}
    assert found["a"] == "open"
    assert found["b"] == ""
    assert 'xllm_router_breaker_state{target="a"' in metrics(cluster)
    cluster.links.sent.clear()
    for _ in range(6):
        ask(cluster)
    assert set(sent_to(cluster)) == {"b"}
    cluster.clock.now += 5
    for name in "ab":
        cluster.beat(name)
    asked = [ask(cluster)[0] for _ in range(4)]
    by_place = dict(zip(sent_to(cluster)[-4:], asked, strict=True))
    assert sent_to(cluster)[-4:].count("a") == 1  # the trial
    cluster.say(by_place["a"], 0, "a", "length")
    cluster.end(by_place["a"])
    found = {one.name: one.breaker for one in cluster.service.status().processes}
    assert found["a"] == ""
    close(cluster)


@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_a_trial_that_answers_makes_room_for_the_next(stream):
    cluster = cluster_with("a", "b", breaker_failures=1, breaker_open_s=5)
    failing = ""
    while failing != "a":
        request_id, _ = ask(cluster)
        failing = cluster.links.sent[-1][0]
        cluster.end(request_id, code="engine_error" if failing == "a" else "")
    cluster.clock.now += 6
    for name in "ab":
        cluster.beat(name)
    cluster.links.sent.clear()
    for num_trials in (1, 2, 3):
        asked = [ask(cluster, stream=stream)[0] for _ in range(4)]
        places = dict(zip(asked, sent_to(cluster)[-4:], strict=True))
        assert sent_to(cluster).count("a") == num_trials
        [trial] = [request_id for request_id, place in places.items() if place == "a"]
        cluster.say(trial, 0, "a")
    close(cluster)


@in_loop
async def test_requests_that_are_bad_themselves_open_no_breaker():
    cluster = cluster_with("a", "b", breaker_failures=1)
    for code in ("invalid_value", "context_length_exceeded", "deadline_exceeded", "aborted"):
        for _ in range(4):
            request_id, _ = ask(cluster)
            cluster.clock.now += 1
            cluster.end(request_id, code=code)
    assert all(one.breaker == "" for one in cluster.service.status().processes)
    close(cluster)


@in_loop
async def test_an_instance_that_dies_again_and_again_under_its_work_is_left_alone():
    cluster = cluster_with("a", "b", breaker_failures=2)
    for incarnation in ("2", "3"):
        for _ in range(4):
            ask(cluster)
        assert "a" in sent_to(cluster)
        cluster.change(cluster.service.view.disconnected("a"))
        cluster.clock.now += 1
        assert cluster.service.placement.breakers.num_opened == (incarnation == "3")
        cluster.join("a", incarnation)  # its old one is lost once more: that is no fault
    cluster.links.sent.clear()
    ask(cluster)
    assert sent_to(cluster) == ["b"]
    close(cluster)


@in_loop
async def test_an_idle_instance_that_comes_and_goes_opens_nothing():
    cluster = cluster_with("a", "b", breaker_failures=1)
    for incarnation in "234":
        cluster.change(cluster.service.view.disconnected("a"))
        cluster.clock.now += 1
        cluster.join("a", incarnation)
    assert cluster.service.placement.breakers.num_opened == 0
    close(cluster)
