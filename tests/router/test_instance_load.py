"""How busy an instance is: its heartbeats, brought forward by what a router did since."""

from __future__ import annotations

from tests.router.policy_questions import BLOCK, instance, ready_view, record
from xllm.protocol.bus import InstanceHeartbeat, InstanceLoad, RouterPresence
from xllm.router.policies.load import (
    free_blocks,
    num_requests,
    num_waiting,
    queued_tokens,
    takes_more,
)
from xllm.router.process_views import InstanceView
from xllm.router.traffic import UNDER_WAY_S


def test_a_heartbeat_is_brought_forward_by_what_was_sent_and_what_ended():
    view, traffic = ready_view("a")
    one = view.get("a")
    traffic.placed("a", 100, 1.0)
    traffic.placed("a", 50, 1.0)
    assert (num_requests(one), queued_tokens(one)) == (2, 150)
    load = InstanceLoad(num_running=7, waiting_tokens=30)  # five are of another router
    word = InstanceHeartbeat("a", "1", 2, "ready", load=load)
    view.heartbeat(word, 1.2)
    traffic.heartbeat(word, 1.2)
    assert (num_requests(one), queued_tokens(one)) == (7, 30)
    traffic.left("a")
    assert num_requests(one) == 6
    traffic.placed("a", 40, 1.3)
    traffic.placed("a", 40, 1.3)
    assert (num_requests(one), queued_tokens(one)) == (8, 110)


def test_what_was_under_way_when_a_heartbeat_was_made_still_counts():
    view, traffic = ready_view("a")
    traffic.placed("a", 100, 1.0)
    traffic.placed("a", 64, 1.2 - UNDER_WAY_S / 2)
    word = InstanceHeartbeat("a", "1", 2, "ready", load=InstanceLoad(num_running=1))
    view.heartbeat(word, 1.2)
    traffic.heartbeat(word, 1.2)
    one = view.get("a")
    assert (num_requests(one), queued_tokens(one)) == (2, 64)


def test_requests_of_other_routers_count_while_they_speak():
    view, traffic = ready_view("a", "b")
    traffic.presence(RouterPresence("r2", "1", 1, (("a", 3), ("gone", 9))), 1.0)
    traffic.presence(RouterPresence("r3", "1", 1, (("a", 4),)), 1.1)
    assert (num_requests(view.get("a")), num_requests(view.get("b"))) == (7, 0)
    traffic.forget(5.0)
    traffic.heartbeat(InstanceHeartbeat("a", "1", 2, "ready"), 5.0)
    assert num_requests(view.get("a")) == 0


def test_a_full_instance_is_believed_until_it_speaks_or_has_one_less():
    view, traffic = ready_view("a")
    one = view.get("a")
    for _ in range(3):
        traffic.placed("a", 1, 1.0)
    for num_left in (2, 1):
        traffic.refused("a")
        assert not takes_more(one, 64)
        traffic.left("a")  # the one that was refused
        assert one.num_inflight == num_left
        assert not takes_more(one, 64)
    traffic.left("a")  # one that ran
    assert takes_more(one, 64)
    traffic.refused("a")  # others fill it
    assert not takes_more(one, 0)
    traffic.heartbeat(InstanceHeartbeat("a", "1", 2, "ready"), 1.1)
    assert takes_more(one, 0)


def test_who_waits_is_beyond_what_runs_at_once():
    assert num_waiting(instance("a", inflight=900)) == 0  # it did not say what it can run
    assert num_waiting(instance("a", inflight=300, max_num_seqs=256)) == 44
    assert num_waiting(instance("a", inflight=200, max_num_seqs=256)) == 0
    assert num_waiting(instance("a", num_waiting=5, num_running=20, max_num_seqs=256)) == 5
    assert num_waiting(instance("a", num_waiting=5)) == 5
    assert takes_more(instance("a", num_waiting=5), 6)
    assert not takes_more(instance("a", num_waiting=5), 5)
    assert takes_more(instance("a", num_waiting=5), 0)


def test_blocks_promised_since_the_last_heartbeat_are_not_free():
    one = instance("a", num_free_blocks=10)
    one.unseen_tokens = 33
    assert free_blocks(one, BLOCK) == 7
    assert free_blocks(InstanceView(record("a")), BLOCK) == 1000
