"""The view of the cluster, and the policies over it."""

from __future__ import annotations

from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import DaemonHeartbeat, InstanceHeartbeat, InstanceLoad
from xllm.protocol.records import InstanceRecord
from xllm.router.report import degraded_parts
from xllm.router.view import ClusterView, ViewChange

NOTHING = ViewChange()


def record(name: str = "a", incarnation: str = "1", model: str = "m") -> InstanceRecord:
    return InstanceRecord(
        name=name,
        incarnation=incarnation,
        endpoint="ipc://x",
        bus_endpoint="ipc://y",
        model=model,
        model_path="",
        max_model_len=64,
        vocab_size=320,
        block_size=16,
        num_blocks=8,
    )


def beat(name: str = "a", incarnation: str = "1", seq: int = 1, state: str = "ready", **load):
    return InstanceHeartbeat(name, incarnation, seq, state, load=InstanceLoad(**load))


def ready_view(*names: str) -> ClusterView:
    view = ClusterView(0.2)
    for name in names:
        view.registered(record(name), 0.0)
        view.connected(name)
        view.heartbeat(beat(name), 0.0)
    view.check()
    return view


def usable(view: ClusterView, model: str = "m") -> list[str]:
    view.check()
    return [one.name for one in view.usable(model)]


def test_an_instance_is_usable_once_registered_connected_and_ready():
    view = ClusterView(0.2)
    assert view.heartbeat(beat(), 0.0) == NOTHING
    assert view.registered(record(), 0.0) == NOTHING
    assert view.heartbeat(beat(state="loading"), 0.0) == NOTHING
    assert view.connected("a") == NOTHING
    assert usable(view) == []
    assert view.heartbeat(beat(seq=2), 0.1) == ViewChange(ready=("a",))
    assert usable(view) == ["a"]
    assert usable(view, "other") == []


def test_draining_takes_nothing_new_and_loses_nothing():
    view = ready_view("a")
    assert view.heartbeat(beat(seq=2, state="draining"), 0.2) == NOTHING
    assert usable(view) == []


def test_failure_disconnection_and_deregistration_lose_it():
    for lose in (
        lambda view: view.heartbeat(beat(seq=2, state="failed"), 0.2),
        lambda view: view.disconnected("a"),
        lambda view: view.registered(record(incarnation="2"), 0.2),
    ):
        view = ready_view("a")
        assert lose(view) == ViewChange(lost=("a",))
        assert usable(view) == []


def test_a_deregistered_instance_that_drains_finishes_what_it_runs():
    for end in (lambda view: view.disconnected("a"), lambda view: view.tick(0.7)):
        view = ready_view("a")
        view.tick(0.5)
        view.heartbeat(beat(seq=2, state="draining"), 0.0)
        assert view.deregistered("a") == NOTHING
        assert usable(view) == []
        assert view.get("a") is not None
        assert end(view) == ViewChange(lost=("a",), left=("a",))
        assert view.get("a") is None
        assert end(view) == NOTHING


def test_an_instance_that_alone_lost_the_registry_is_used_on():
    view = ready_view("a")
    assert view.deregistered("a") == NOTHING
    assert usable(view) == ["a"]
    assert degraded_parts(view, False, False, 0.0) == ("instance a is not registered",)
    assert view.heartbeat(beat(seq=2), 0.2) == NOTHING
    assert usable(view) == ["a"]
    assert view.registered(record(), 0.3) == NOTHING
    assert usable(view) == ["a"]
    assert degraded_parts(view, False, False, 0.0) == ()
    view.deregistered("a")
    assert view.disconnected("a") == ViewChange(lost=("a",)), "it died, and did not leave"
    assert view.get("a") is None
    view = ready_view("a")
    view.deregistered("a")
    assert view.registered(record(incarnation="2"), 0.3) == ViewChange(lost=("a",))
    assert usable(view) == []
    view.disconnected("a")
    assert view.deregistered("a") == ViewChange(lost=("a",))


def test_a_heartbeat_that_comes_again_says_nothing():
    view = ready_view("a")
    for step in range(1, 4):
        view.heartbeat(beat(), 0.2 * step)
        view.tick(0.2 * step)
    assert view.tick(0.7) == ViewChange(suspect=("a",))
    assert view.heartbeat(beat(), 0.8) == NOTHING
    assert usable(view) == []


def test_connections_that_a_pause_of_this_process_cost_are_no_deaths():
    view = ready_view("a", "b")
    view.tick(0.3)
    view.tick(9.0)
    assert view.disconnected("a") == ViewChange(lost=("a",), left=("a",))
    assert view.get("a") is not None
    for step in range(1, 20):
        view.heartbeat(beat("b", seq=1 + step), 9.0 + step / 10)
        view.tick(9.0 + step / 10)
    assert view.disconnected("b") == ViewChange(lost=("b",))


def test_three_silent_periods_are_suspect_and_one_word_ends_it():
    view = ready_view("a", "b")
    for step in range(1, 4):
        view.heartbeat(beat("b", seq=1 + step), 0.2 * step)
        assert view.tick(0.2 * step) == NOTHING
    assert view.tick(0.7) == ViewChange(suspect=("a",))
    assert view.tick(0.75) == NOTHING
    assert usable(view) == ["b"]
    assert view.heartbeat(beat(seq=9), 0.8) == ViewChange(ready=("a",))
    one = view.get("a")
    assert one is not None
    assert one.num_gaps == 1


def test_a_deaf_instance_gets_nothing_however_well_it_speaks():
    view = ready_view("a", "b")
    assert view.deaf("a") == ViewChange(suspect=("a",))
    assert view.deaf("a") == view.deaf("c") == view.hears("c") == NOTHING
    assert view.heartbeat(beat(seq=2), 0.1) == NOTHING
    assert usable(view) == ["b"]
    assert view.hears("a") == ViewChange(ready=("a",))
    assert view.hears("a") == NOTHING
    assert usable(view) == ["a", "b"]


def test_a_new_connection_of_a_deaf_instance_is_believed():
    view = ready_view("a")
    view.deaf("a")
    assert view.disconnected("a").lost == ("a",)
    assert view.deaf("a") == NOTHING
    assert view.connected("a") == NOTHING
    assert view.heartbeat(beat(seq=2), 0.1) == ViewChange(ready=("a",))


def test_an_instance_that_leaves_may_be_deaf():
    view = ready_view("a")
    view.heartbeat(beat(seq=2, state="draining"), 0.1)
    view.deregistered("a")
    assert view.deaf("a") == NOTHING
    assert view.get("a") is not None
    view = ready_view("b")
    view.deregistered("b")  # it alone lost the registry
    assert view.deaf("b") == ViewChange(suspect=("b",))
    assert usable(view) == []


def test_deaf_and_silent_are_two_reasons():
    view = ready_view("a")
    view.tick(0.5)
    view.deaf("a")
    assert view.tick(0.7) == ViewChange(suspect=("a",))
    assert view.hears("a") == NOTHING
    assert view.heartbeat(beat(seq=2), 0.8) == ViewChange(ready=("a",))


def test_a_pause_of_the_router_itself_suspects_nobody():
    view = ready_view("a")
    view.tick(0.1)
    assert view.tick(5.0) == NOTHING
    assert view.tick(5.2) == NOTHING
    assert usable(view) == ["a"]


def test_a_new_incarnation_is_heard_only_after_it_registered():
    view = ready_view("a")
    view.disconnected("a")
    view.connected("a")
    assert view.heartbeat(beat(incarnation="2"), 0.1) == NOTHING
    assert usable(view) == []
    view.registered(record(incarnation="2"), 0.1)
    view.connected("a")
    assert view.heartbeat(beat(incarnation="2"), 0.2) == ViewChange(ready=("a",))


def test_daemons_come_and_go():
    view = ClusterView(0.2)
    view.daemon_heartbeat(DaemonHeartbeat("d", "1", 1, dram_blocks=3), 1.0)
    assert view.daemons["d"].heartbeat.dram_blocks == 3
    view.publisher_gone(PeerRole.ROUTER, "d")
    assert set(view.daemons) == {"d"}
    view.publisher_gone(PeerRole.DAEMON, "d")
    assert not view.daemons
