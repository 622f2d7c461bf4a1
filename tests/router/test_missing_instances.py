"""Who went without leaving stays visible for a while; who left, or came back, does not."""

from __future__ import annotations

import pytest

from tests.router.fake_cluster import FakeCluster, in_loop
from tests.router.test_view import beat, ready_view, record
from xllm.router.lost_instances import LOST_KEPT_S, MAX_LOST
from xllm.router.report import degraded_parts


def lost(view) -> list[str]:
    view.check()
    return [one.name for one in view.lost]


def frozen_view():
    """`a` fell silent, and its lease ended."""
    view = ready_view("a", "b")
    view.tick(0.5)
    view.heartbeat(beat("b", seq=2), 0.6)
    view.tick(0.7)
    assert view.get("a").silent
    assert lost(view) == []
    view.deregistered("a")
    return view


def test_a_frozen_instance_is_lost_once_its_lease_ends():
    view = frozen_view()
    assert view.get("a") is None
    assert lost(view) == ["a"]
    (one,) = view.lost
    assert (one.incarnation, one.model, one.role, one.heard_at) == ("1", "m", "both", 0.0)
    assert degraded_parts(view, False, False, 0.0) == ("instance a is lost",)


@pytest.mark.parametrize("incarnation", ["1", "2"])
def test_who_comes_back_is_no_longer_lost(incarnation):
    view = frozen_view()
    view.registered(record("a", incarnation), 9.0)
    assert lost(view) == []
    assert view.get("a") is not None


def test_who_is_replaced_by_what_cannot_be_used_is_no_longer_lost():
    view = frozen_view()
    view.deregistered("a", replaced=True)
    assert lost(view) == []
    view.deregistered("a")
    assert lost(view) == []


@pytest.mark.parametrize(
    "end",
    [lambda view: view.disconnected("a"), lambda view: (view.tick(0.5), view.tick(0.7))],
    ids=["connection", "silence"],
)
def test_who_goes_after_it_was_replaced_is_not_missed(end):
    view = ready_view("a")
    view.tick(0.3)
    view.deregistered("a", replaced=True)
    view.deregistered("a")  # the other process went before it
    assert view.get("a").usable
    end(view)
    assert view.get("a") is None
    assert lost(view) == []


def test_who_has_its_name_again_is_missed_again():
    view = ready_view("a")
    view.deregistered("a", replaced=True)
    view.registered(record("a"), 0.1)
    view.disconnected("a")
    view.deregistered("a")
    assert lost(view) == ["a"]


def test_it_is_forgotten_in_the_end():
    view = frozen_view()
    view.tick(LOST_KEPT_S)
    assert lost(view) == ["a"]
    view.tick(LOST_KEPT_S + 0.1)
    assert lost(view) == []
    assert degraded_parts(view, False, False, 0.0) == ()


@pytest.mark.parametrize(
    "die",
    [
        lambda view: (view.disconnected("a"), view.deregistered("a")),
        lambda view: (view.deregistered("a"), view.disconnected("a")),
        lambda view: (view.deregistered("a"), view.tick(0.5), view.tick(0.7)),
        lambda view: (
            (view.heartbeat(beat(seq=2, state="failed"), 0.1), view.deregistered("a"))
            and view.disconnected("a")
        ),
    ],
    ids=["killed", "killed without a record", "frozen without a record", "failed"],
)
def test_other_ends_without_leaving(die):
    view = ready_view("a")
    view.tick(0.3)
    die(view)
    assert view.get("a") is None
    assert lost(view) == ["a"]


@pytest.mark.parametrize(
    "end",
    [
        lambda view: (view.deregistered("a"), view.disconnected("a")),
        lambda view: (view.disconnected("a"), view.deregistered("a")),
        lambda view: (view.refused("a"), view.disconnected("a"), view.deregistered("a")),
        lambda view: (view.deregistered("a"), view.tick(0.5), view.tick(0.7)),
        lambda view: (view.tick(0.5), view.tick(0.7), view.deregistered("a")),
    ],
    ids=["in order", "connection first", "after a refusal", "silent at last", "slowly"],
)
def test_who_drained_has_left(end):
    view = ready_view("a")
    view.tick(0.3)
    view.heartbeat(beat(seq=2, state="draining"), 0.0)
    end(view)
    assert view.get("a") is None
    assert lost(view) == []


def test_who_was_never_heard_of_is_not_missed():
    view = ready_view()
    view.registered(record("a"), 0.0)
    view.deregistered("a")
    assert lost(view) == []


def test_names_that_come_and_go_do_not_pile_up():
    view = ready_view()
    num_names = MAX_LOST + 10
    for number in range(num_names):
        name = f"i{number:03}"
        view.registered(record(name), float(number))
        view.connected(name)
        view.heartbeat(beat(name), float(number))
        view.disconnected(name)
        view.deregistered(name)
    assert lost(view) == [f"i{number:03}" for number in range(num_names - MAX_LOST, num_names)]


@in_loop
async def test_a_pause_of_the_router_makes_no_heartbeat_younger():
    cluster = FakeCluster("a")
    view = cluster.service.view
    cluster.tick()
    cluster.clock.now += 100.0
    cluster.tick()
    assert view.get("a").usable
    assert age_ms(cluster) == pytest.approx(100_000, abs=1)
    for _ in range(3):
        cluster.clock.now += 0.3
        cluster.tick()
    assert view.get("a").silent
    cluster.change(view.deregistered("a"))
    cluster.clock.now += 199.1
    assert lost(view) == ["a"]
    assert age_ms(cluster) == pytest.approx(300_000, abs=1)
    cluster.close()


def age_ms(cluster) -> int:
    """Of the last heartbeat of `a`, as status shows it."""
    (one,) = [one for one in cluster.service.status().processes if one.name == "a"]
    return one.heartbeat_age_ms


@in_loop
async def test_status_says_when_it_was_heard_last():
    cluster = FakeCluster("a", "b")
    cluster.clock.now += 0.5
    cluster.beat("b")
    cluster.tick()
    cluster.clock.now += 0.2
    cluster.tick()
    cluster.clock.now += 0.1
    cluster.change(cluster.service.view.deregistered("a"))
    cluster.clock.now += 299.2
    shown = {one.name: one for one in cluster.service.status().processes}
    assert (shown["a"].kind, shown["a"].state, shown["a"].model) == ("instance", "lost", "m")
    assert shown["a"].incarnation == "1"
    assert shown["a"].heartbeat_age_ms == pytest.approx(300_000, abs=1)
    assert "instance a is lost" in (await cluster.service.health(False)).degraded
    cluster.join("a", "2")
    assert [one.state for one in cluster.service.status().processes if one.name == "a"] == ["ready"]
    cluster.close()
