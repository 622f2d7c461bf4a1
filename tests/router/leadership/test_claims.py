"""Epochs that a candidate hears of while its claim of the leader key is not answered yet."""

from __future__ import annotations

import pytest

from tests.router.leadership.test_election import KEY, TTL_S, World
from xllm.protocol.registry_wire import CasResult, Entry, Lease
from xllm.router.leadership.election import Election


def claiming(*heard: int):
    """An election that has heard of these epochs, and the claim that it sends then."""
    one = Election(TTL_S)
    for epoch in heard:
        one.outbid(epoch)
    one.granted(one.next_call(0.0), Lease(7, TTL_S), 0.1)
    return one, one.next_call(0.1)


def test_a_claim_does_not_outbid_itself():
    one, call = claiming(19)
    one.seen(Entry(KEY, b"me", 20, 20, 7), 20)
    one.outbid(20)  # a peer has seen the key, and says so before the claim is answered
    assert one.needed_base(0, 20) == 0
    one.claimed(call, CasResult(True, 20, Entry(KEY, b"me", 20, 20, 7)), 0.2)
    assert one.epoch == 20
    one.outbid(20)
    assert one.leads(0.3)


@pytest.mark.parametrize("heard_first", [True, False])
def test_a_base_is_raised_for_higher_epochs_and_for_the_same_of_before_the_claim(heard_first):
    one, call = claiming(*([20] if heard_first else []))
    one.outbid(20 if heard_first else 21)
    needed = 20 if heard_first else 21
    assert one.needed_base(0, 20) == needed
    assert one.needed_base(needed - 19, 20) == needed - 19, "high enough as it is"
    one.outbid(needed + 20)  # the claim's under the raised base
    one.claimed(call, CasResult(True, 22, Entry(KEY, b"me", 20, 22, 7)), 0.2, base=needed)
    assert one.epoch == needed + 20


def test_a_claim_gives_way_to_a_higher_epoch_that_is_heard_of_before_its_answer():
    one, call = claiming()
    one.outbid(21)
    one.claimed(call, CasResult(True, 20, Entry(KEY, b"me", 20, 20, 7)), 0.2)
    assert one.epoch == 0


def test_an_epoch_that_another_leads_under_is_no_echo_of_the_own_claim():
    """A registry that lost its data gives the other's revision out again."""
    one, call = claiming()
    one.led(20)
    assert one.needed_base(0, 20) == 20
    one.claimed(call, CasResult(True, 20, Entry(KEY, b"me", 20, 20, 7)), 0.2)
    assert one.epoch == 0


@pytest.mark.parametrize(("epoch", "leads"), [(19, True), (20, False), (21, False)])
def test_who_hears_that_another_leads_under_its_epoch_or_above_leads_no_more(epoch, leads):
    one, call = claiming()
    one.claimed(call, CasResult(True, 20, Entry(KEY, b"me", 20, 20, 7)), 0.2)
    one.led(epoch)
    assert one.leads(0.3) == leads
    if not leads:
        revoke = one.next_call(0.3)
        one.revoked(revoke, True, 0.4)
        assert one.next_call(0.5) is None, "it lets others go first"
        one.granted(one.next_call(1.0), Lease(8, TTL_S), 1.1)
        assert one.next_call(1.1) is not None
        assert one.needed_base(0, 20) == epoch


def test_whose_claim_is_done_in_a_quiet_cluster_leads():
    for seed in range(40):
        world = World(seed, 4, 0.0, 0.0)
        world.quiet_at = 0.0
        for router in world.routers:
            world.at(world.random.uniform(0, 0.5), router.begin)
        world.run(5.0)
        [leader] = world.leaders()
        before = world.store.revision
        leader.die()
        world.run(15.0)
        changes = world.store.changes_after(KEY, before)
        assert [change.entry is not None for change in changes] == [False, True], seed
        assert [one.election.epoch for one in world.leaders()] == [world.store.revision]
