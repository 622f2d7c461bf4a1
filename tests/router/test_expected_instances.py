"""A router that has just started: requests wait for instances that it has not heard from yet."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.fake_cluster import FakeCluster, FakeLinks, in_loop
from xllm.config.admission import AdmissionSettings
from xllm.protocol.bus import InstanceHeartbeat, InstanceLoad
from xllm.protocol.generation import LIFE_ATTEMPTS, RequestFinished, ResumePoint
from xllm.protocol.records import InstanceRecord
from xllm.router.placement import Placement
from xllm.router.policies.question import RouteFigures
from xllm.router.policies.round_robin import RoundRobin
from xllm.router.view import ClusterView

GRACE_S = 2.0


def cluster_with(*registered: str, **more) -> FakeCluster:
    """A router that read these instances' records a moment ago."""
    cluster = FakeCluster(admission=AdmissionSettings(**{"expected_instance_s": GRACE_S, **more}))
    for name in registered:
        cluster.register(name)
    return cluster


def appear(cluster: FakeCluster, name: str = "a", **more) -> None:
    cluster.change(cluster.service.view.connected(name))
    cluster.beat(name, **more)


def num_waiting(cluster: FakeCluster) -> int:
    cluster.service.admission.check()
    return cluster.service.admission.num_waiting


def pass_time(cluster: FakeCluster, seconds: float, **load) -> None:
    for _ in range(round(seconds * 10)):
        cluster.clock.now += 0.1
        if load:
            cluster.beat("a", load=InstanceLoad(**load))
        cluster.tick()


# -- whom a view expects --------------------------------------------------------------------------


def record(incarnation: str = "1") -> InstanceRecord:
    return InstanceRecord(
        name="a",
        incarnation=incarnation,
        endpoint="",
        bus_endpoint="",
        model="m",
        model_path="",
        max_model_len=8,
        vocab_size=8,
        block_size=4,
        num_blocks=8,
    )


def test_an_instance_is_expected_until_it_is_connected_and_heard_of():
    def word(seq: int, state: str = "ready") -> InstanceHeartbeat:
        return InstanceHeartbeat("a", "1", seq, state)

    view = ClusterView(0.2)
    placement = Placement(view, RoundRobin(RouteFigures()), FakeLinks(), lambda: 0.0)

    def expects(model: str = "m", now: float = 0.5) -> bool:
        return placement.expects(model, now, 1.0)

    assert not expects()
    view.registered(record(), 0.0)
    assert expects()
    assert not expects("other")
    assert not expects(now=1.0)
    assert not placement.expects("m", 0.0, 0.0)
    view.heartbeat(word(1), 0.1)
    assert expects()  # its connection is missing
    view.connected("a")
    assert not expects()
    view.disconnected("a")
    assert not expects()  # it was lost
    view.registered(record("2"), 0.4)
    assert expects(now=1.3)
    view.connected("a")
    assert expects()  # its word is missing
    view.disconnected("a")
    assert not expects()
    view.registered(record("1"), 0.5)
    view.heartbeat(word(1, "loading"), 0.5)
    assert not expects()  # that takes its time
    view.registered(record("3"), 0.5)
    view.deregistered("a")
    assert not expects()


# -- who waits, and what ends that ----------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["hello", (70, 71, 72)])
@in_loop
async def test_requests_wait_until_an_instance_is_heard_of(prompt, stream):
    cluster = cluster_with("a", "b")
    best_effort, _ = cluster.ask(prompt, stream=stream, offline=True)
    asked = [cluster.ask(prompt, stream=stream) for _ in range(3)]
    assert not cluster.links.sent
    assert num_waiting(cluster) == 4
    pass_time(cluster, GRACE_S / 2)
    assert num_waiting(cluster) == 4
    assert not (await cluster.service.health(probe=False)).ready
    appear(cluster, "b")
    admitted = [word.request_id for word in cluster.links.admits()]
    assert admitted == [*[request_id for request_id, _ in asked], best_effort]
    assert num_waiting(cluster) == 0
    for request_id, sink in asked:
        cluster.say(request_id, 0, "a", "length")
        cluster.end(request_id)
        assert isinstance(sink.last, RequestFinished)
    cluster.close()


@in_loop
async def test_a_prompt_that_is_encoded_in_a_thread_waits_too(monkeypatch):
    monkeypatch.setattr("xllm.router.submission.is_long_request", lambda request: True)
    cluster = cluster_with("a")
    request_id, sink = cluster.ask()
    async with asyncio.timeout(10):
        while num_waiting(cluster) == 0:
            await asyncio.sleep(0.001)
    appear(cluster)
    assert [word.request_id for word in cluster.links.admits()] == [request_id]
    assert not sink.messages
    cluster.close()


@in_loop
async def test_the_wait_is_bounded_and_ends_as_if_there_had_been_none():
    cluster = cluster_with("a")
    _, refused = cluster_with().ask()
    _, first = cluster.ask()
    pass_time(cluster, GRACE_S - 0.5)
    _, second = cluster.ask()
    assert num_waiting(cluster) == 2
    pass_time(cluster, 0.6)
    for sink in (first, second):
        assert (sink.last.code, sink.last.message) == ("unavailable", "no instance is ready")
        assert sink.last.retry_after_ms == refused.last.retry_after_ms == 1000
    _, late = cluster.ask()
    assert late.last.message == "no instance is ready"
    appear(cluster)
    _, served = cluster.ask()
    assert not served.messages
    assert 'reason="timeout",tenant="default"' in cluster.service.metrics_text().decode()
    cluster.close()


@pytest.mark.parametrize("why", ["loading", "draining", "gone", "lost"])
@in_loop
async def test_whoever_waits_in_vain_is_told_at_once(why):
    cluster = cluster_with("a")
    _, sink = cluster.ask()
    if why == "gone":
        cluster.change(cluster.service.view.deregistered("a"))
    elif why == "lost":
        cluster.change(cluster.service.view.disconnected("a"))
    else:
        cluster.beat("a", state=why)
    cluster.tick()
    assert (sink.last.code, sink.last.message) == ("unavailable", "no instance is ready")
    _, late = cluster.ask()
    assert late.last.code == "unavailable"
    cluster.close()


@pytest.mark.parametrize("off", [{"expected_instance_s": 0.0}, {"queue_size": 0}])
@in_loop
async def test_nothing_waits_where_it_is_turned_off(off):
    cluster = cluster_with("a", **off)
    _, sink = cluster.ask()
    assert (sink.last.code, sink.last.message) == ("unavailable", "no instance is ready")
    assert num_waiting(cluster) == 0
    cluster.close()


@in_loop
async def test_an_instance_that_turns_up_busy_is_waited_for_as_any_other():
    cluster = cluster_with("a", instance_waiting=1, queue_timeout_s=20.0)
    _, sink = cluster.ask()
    busy = {"num_running": 4, "num_waiting": 8}
    appear(cluster, load=InstanceLoad(**busy))
    pass_time(cluster, 2 * GRACE_S, **busy)
    assert num_waiting(cluster) == 1
    cluster.change(cluster.service.view.disconnected("a"))
    pass_time(cluster, 5)
    assert not sink.messages  # nor is it forgotten that it was there
    pass_time(cluster, 15)
    assert (sink.last.code, sink.last.message) == ("unavailable", "no instance was ready in time")
    cluster.close()


@in_loop
async def test_aborts_deadlines_and_limits_hold_while_requests_wait():
    cluster = cluster_with("a", concurrency=3)
    aborted_id, aborted = cluster.ask()
    _, late = cluster.ask(timeout_ms=500)
    _, hurried = cluster.ask(ttft_ms=500)
    _, beyond = cluster.ask()
    assert beyond.last.code == "rate_limit_exceeded"
    cluster.service.abort(aborted_id)
    assert aborted.last.code == "aborted"
    assert num_waiting(cluster) == 2
    patient_id, patient = cluster.ask()
    pass_time(cluster, 0.7)
    assert late.last.code in ("deadline_exceeded", "unavailable")
    assert (hurried.last.code, hurried.last.message) == (
        "unavailable",
        "no instance was ready in time",
    )
    assert not patient.messages
    appear(cluster)
    assert [word.request_id for word in cluster.links.admits()] == [patient_id]
    assert not cluster.links.cancels()
    cluster.close()


@in_loop
async def test_the_line_is_bounded_while_requests_wait():
    cluster = cluster_with("a", queue_size=2)
    _, offline = cluster.ask(offline=True)
    _, low = cluster.ask(priority=-1)
    cluster.ask()
    _, refused = cluster.ask(priority=-2)
    assert (offline.last.code, refused.last.code) == ("overloaded", "overloaded")
    assert refused.last.retry_after_ms > 0
    assert not low.messages
    assert num_waiting(cluster) == 2
    cluster.close()


@in_loop
async def test_a_router_that_stops_ends_who_waits():
    cluster = cluster_with("a")
    _, sink = cluster.ask()
    assert await cluster.service.drain(0.01) == 1
    assert sink.last.code == "aborted"
    _, late = cluster.ask()
    assert late.last.message == "this router is about to stop"
    assert num_waiting(cluster) == 0
    cluster.close()


@in_loop
async def test_a_router_that_stops_serves_who_waits_if_it_may():
    cluster = cluster_with("a")
    request_id, sink = cluster.ask()
    draining = asyncio.ensure_future(cluster.service.drain(10))
    await asyncio.sleep(0)
    appear(cluster)
    cluster.say(request_id, 0, "a", "length")
    cluster.end(request_id)
    assert await draining == 0
    assert isinstance(sink.last, RequestFinished)
    cluster.close()


@in_loop
async def test_one_that_another_router_lost_is_first():
    cluster = cluster_with("a")
    cluster.ask()
    point = ResumePoint(attempt=1, outputs=((5, 6),), seed=1)
    cluster.ask(resume=point)
    assert num_waiting(cluster) == 1
    pass_time(cluster, GRACE_S + 1)
    assert num_waiting(cluster) == 0
    assert cluster.service.num_open == 1  # it waits longer
    appear(cluster)
    assert [word.attempt for word in cluster.links.admits()] == [LIFE_ATTEMPTS]
    cluster.close()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "abort", "register", "connect", "ready", "busy", "loading", "lose",
             "deregister", "tick", "tick", "tick"]
        ),
        st.sampled_from("ab"),
        st.booleans(),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_whatever_comes_nobody_waits_for_an_instance_that_does_not_come(events):
    """In the end no instance is left: of online requests nobody waits beyond the queue's time, and
    where none was ever ready, nobody at all waits beyond the grace."""

    async def main() -> None:
        cluster = cluster_with(instance_waiting=1, queue_size=4, queue_timeout_s=5.0)
        view = cluster.service.view
        asked, incarnations = [], dict.fromkeys("ab", 0)
        for event, name, flag in events:
            incarnation = str(incarnations[name])
            if event == "ask":
                asked.append((*cluster.ask(offline=flag), flag))
            elif event == "abort" and asked:
                cluster.service.abort(asked[-1][0])
            elif event == "register":
                incarnations[name] += flag
                cluster.register(name, str(incarnations[name]))
            elif event == "connect":
                cluster.change(view.connected(name))
            elif event in ("ready", "busy", "loading"):
                load = InstanceLoad(num_waiting=9 if event == "busy" else 0)
                state = "ready" if event == "busy" else event
                cluster.beat(name, incarnation, state, load=load)
            elif event == "lose":
                cluster.change(view.disconnected(name))
            elif event == "deregister":
                cluster.change(view.deregistered(name))
            elif event == "tick":
                pass_time(cluster, 0.3 if flag else 0.1)
            cluster.service.dispatcher.check()
            assert num_waiting(cluster) <= 4
        if not {"ready", "busy"} & {event for event, _, _ in events}:
            pass_time(cluster, GRACE_S + 0.1)
            assert all(sink.done.is_set() for _, sink, _ in asked)
        for name in "ab":
            cluster.change(view.disconnected(name))
            cluster.change(view.deregistered(name))
        cluster.tick()
        pass_time(cluster, 5.1)
        sent = {word.request_id for word in cluster.links.admits()}
        for request_id, sink, offline in asked:
            assert sink.done.is_set() or offline or request_id in sent
        cluster.close()

    asyncio.run(main())
