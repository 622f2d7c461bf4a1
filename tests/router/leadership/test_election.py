"""The election as a whole, in simulated time: routers with clocks of their own, a real registry
store, words that are late or lost, processes that stand still or die.

Never do two routers say at one true time that they lead; epochs only grow; and once the registry
answers again there is a leader within a lease and a second and a half.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.errors import FencedError
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import CasResult, Change, Entry, Lease
from xllm.router.leadership.election import AGAIN_S, Election, Step, margin_s

TTL_S = 2.0
KEY = "/leader"
ANSWER_S = 1.5
"""What an election takes at most, after the lease of the one before."""
SKEW = 0.03
"""Clocks run so much faster or slower than they should, at most."""


class World:
    """True time, and what happens in it."""

    def __init__(self, seed: int, num_routers: int, loss: float, slowest_s: float) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.loss = loss
        self.slowest_s = slowest_s
        self.quiet_at = float("inf")
        self._counter = itertools.count()
        self._heap: list = []
        self.rate = self.clock_rate()
        self.store = RegistryStore(first_revision=self.random.randrange(1, 1000))
        self.epochs: list[int] = []
        self.routers = [Router(self, number) for number in range(num_routers)]

    def at(self, time: float, call, *args) -> None:
        heapq.heappush(self._heap, (max(time, self.now), next(self._counter), call, args))

    def delay(self) -> float:
        """How long a word is on its way; those of the bad times are over when they are."""
        if self.now >= self.quiet_at:
            return self.random.uniform(0.0, 0.02)
        usual = self.random.uniform(0.0, 0.005)
        late = self.random.uniform(0.0, self.slowest_s)
        return min(usual if self.random.random() < 0.6 else late, self.quiet_at - self.now)

    def clock_rate(self) -> float:
        return 1 + self.random.choice((-SKEW, 0.0, SKEW))

    def is_lost(self, router: Router) -> bool:
        if self.now < router.cut_until:
            return True
        return self.now < self.quiet_at and self.random.random() < self.loss

    def registry_now(self) -> float:
        return self.now * self.rate

    def registry(self, call):
        """Whatever was written or lapsed is told to every watch, in order."""
        before = self.store.revision
        self.store.expire(self.registry_now())
        result = call(self.registry_now()) if call is not None else None
        self.store.check()
        for change in self.store.changes_after(KEY, before) or ():
            for router in self.routers:
                router.watch_hears(change)
        expiry = self.store.next_expiry()
        if expiry is not None:
            self.at(expiry / self.rate + 1e-6, self.registry, None)
        return result

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, call, args = heapq.heappop(self._heap)
            call(*args)
            self.check()
        self.now = until
        self.check()

    def leaders(self) -> list[Router]:
        return [router for router in self.routers if router.leads()]

    def check(self) -> None:
        leaders = self.leaders()
        assert len(leaders) <= 1, f"at {self.now}: {[one.number for one in leaders]}"
        for one in leaders:
            if one.election.epoch not in self.epochs:
                assert one.election.epoch > max(self.epochs, default=0)
                self.epochs.append(one.election.epoch)


class Router:
    """One candidate: its clock, and words that wait while it stands still."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.rate = world.clock_rate()
        self.offset = world.random.uniform(0, 1e6)
        self.election = Election(TTL_S)
        self.is_dead = False
        self.resumes_at = 0.0
        self.cut_until = 0.0
        self.heard_at = 0.0
        self.answered: set[int] = set()
        self.news: deque[Change] = deque()

    def clock(self) -> float:
        return self.offset + self.world.now * self.rate

    def leads(self) -> bool:
        """A process that stands still leads on by its own clock, until that says no."""
        return not self.is_dead and self.election.leads(self.clock())

    def begin(self) -> None:
        self.act(lambda: None)

    def act(self, event) -> None:
        """An event of this process: later, if it stands still."""
        if self.is_dead:
            return
        if self.world.now < self.resumes_at:
            self.world.at(self.resumes_at, self.act, event)
            return
        event()
        now = self.clock()
        call = self.election.next_call(now)
        if call is not None:
            self.make(call)
        wake_at = self.election.wake_at(now)
        if wake_at is not None:
            self.world.at((wake_at - self.offset) / self.rate + 1e-6, self.act, lambda: None)

    def make(self, call) -> None:
        world = self.world
        world.at(world.now + call.timeout_s / self.rate, self.act, lambda: self.answer(call, None))
        if not world.is_lost(self):
            world.at(world.now + world.delay(), self.reach, call)

    def reach(self, call) -> None:
        """The call is at the registry."""
        store = self.world.store

        def carry_out(now):
            if call.step is Step.GRANT:
                return store.grant(TTL_S, now)
            if call.step is Step.RENEW:
                return store.keep_alive(call.lease_id, now)
            if call.step is Step.REVOKE:
                store.revoke(call.lease_id, now)
                return True
            try:
                return store.compare_and_set(KEY, 0, b"%d" % self.number, call.lease_id, now)
            except FencedError:
                return None

        result = self.world.registry(carry_out)
        if not self.world.is_lost(self):
            back = self.world.now + self.world.delay()
            self.world.at(back, self.act, lambda: self.answer(call, result))

    def answer(self, call, result) -> None:
        if call.number in self.answered:
            return  # in time, or too late
        self.answered.add(call.number)
        tell = {
            Step.GRANT: self.election.granted,
            Step.CLAIM: self.election.claimed,
            Step.RENEW: self.election.renewed,
        }.get(call.step)
        if tell is None:
            self.election.revoked(call, result is not None, self.clock())
        else:
            tell(call, result, self.clock())

    def watch_hears(self, change) -> None:
        """In order, and never lost, but late."""
        come_at = max(self.world.now, self.cut_until) + self.world.delay()
        self.heard_at = max(self.heard_at, come_at)
        self.news.append(change)
        self.world.at(self.heard_at, self.act, self.hear)

    def hear(self) -> None:
        """The oldest change that was not told yet, whichever this is about."""
        change = self.news.popleft()
        self.election.seen(change.entry, change.revision)
        if change.entry is not None:
            self.tell(change.entry.create_revision)

    def tell(self, epoch: int) -> None:
        """Whoever knows an epoch says so, to itself, too: it may come before the claim's answer."""
        for router in self.world.routers:
            if router is self or not self.world.is_lost(router):
                come_at = self.world.now + self.world.delay()
                self.world.at(come_at, router.act, lambda it=router: it.election.outbid(epoch))

    def pause(self, seconds: float) -> None:
        self.resumes_at = max(self.resumes_at, self.world.now + seconds)

    def cut_off(self, seconds: float) -> None:
        """It reaches nobody, and what it watches comes when it is over."""
        self.cut_until = max(self.cut_until, self.world.now + seconds)

    def die(self) -> None:
        self.is_dead = True


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_routers=st.integers(1, 4),
    loss=st.sampled_from((0.0, 0.05, 0.3)),
    slowest_s=st.sampled_from((0.05, 1.0, 4.0)),
    num_pauses=st.integers(0, 12),
    num_cuts=st.integers(0, 6),
    num_resignations=st.integers(0, 1),
    num_deaths=st.integers(0, 2),
)
def test_never_two_leaders_and_soon_one(
    seed, num_routers, loss, slowest_s, num_pauses, num_cuts, num_resignations, num_deaths
):
    world = World(seed, num_routers, loss, slowest_s)
    bad_s = 20.0
    for router in world.routers:
        world.at(world.random.uniform(0, 0.5), router.begin)
    for _ in range(num_pauses):
        victim = world.random.choice(world.routers)
        length = world.random.choice((0.3, 1.0, 2.5, 6.0))
        world.at(world.random.uniform(0, bad_s - length), victim.pause, length)
    for _ in range(num_cuts):
        world.at(world.random.uniform(0, bad_s - 3.0), cut_leader, world, 3.0)
    survivors = world.routers[1:]
    for event in ["die"] * num_deaths + ["resign"] * num_resignations:
        if survivors:
            victim = survivors.pop()
            act = victim.die if event == "die" else (lambda: None)
            world.at(world.random.uniform(0, bad_s), act)
            if event == "resign":
                world.at(world.random.uniform(0, bad_s), victim.act, victim.election.resign)
    world.quiet_at = bad_s
    world.run(bad_s)
    world.run(bad_s + (TTL_S + ANSWER_S) / (1 - SKEW))
    assert len(world.leaders()) == 1
    leader = world.leaders()[0]
    epoch = leader.election.epoch
    world.run(world.now + 3 * TTL_S)
    assert world.leaders() == [leader], "a leader that is answered stays"
    assert leader.election.epoch == epoch
    assert world.store.get(KEY, world.registry_now()).create_revision == epoch
    for router in world.routers:
        if not router.is_dead:
            assert router.election.entry.create_revision == epoch


def cut_leader(world: World, seconds: float) -> None:
    """Who leads, if anybody does, is cut off from the registry."""
    for leader in world.leaders():
        leader.cut_off(seconds)


def grown(ttl_s=TTL_S):
    """An election that leads since 0.2 under lease 7, granted at 0."""
    one = Election(ttl_s)
    one.granted(one.next_call(0.0), Lease(7, ttl_s), 0.1)
    entry = Entry(KEY, b"me", 20, 20, 7)
    one.claimed(one.next_call(0.1), CasResult(True, 20, entry), 0.2)
    return one


def test_leadership_ends_by_the_time_that_the_grant_was_sent():
    one = grown()
    end = TTL_S - margin_s(TTL_S)
    assert one.leads(end - 0.001)
    assert not one.leads(end)
    assert one.epoch == 20


def test_a_renewal_counts_from_when_it_was_sent():
    one = grown()
    call = one.next_call(0.5)
    assert call.step is Step.RENEW
    one.renewed(call, TTL_S, 0.9)
    assert one.deadline == pytest.approx(0.5 + TTL_S - margin_s(TTL_S))


def test_a_late_answer_to_an_abandoned_call_counts_for_nothing():
    one = grown()
    call = one.next_call(0.5)
    revoke = one.next_call(5.0)
    assert not one.leads(5.0)
    assert (revoke.step, revoke.lease_id) == (Step.REVOKE, 7)
    one.renewed(call, TTL_S, 5.1)
    assert one.epoch == 0
    assert not one.leads(5.1)


def test_news_older_than_the_claim_end_nothing():
    one = grown()
    one.seen(None, 19)
    assert one.epoch == 20
    one.seen(None, 21)
    assert one.epoch == 0


def test_a_registry_that_began_anew_with_lower_revisions_has_a_leader_again():
    one = grown()
    one.renewed(one.next_call(0.5), 0.0, 0.6)
    one.granted(one.next_call(0.6), Lease(1, TTL_S), 0.7)
    one.claimed(one.next_call(0.7), CasResult(False, 3, Entry(KEY, b"other", 3, 3, 9)), 0.8)
    one.revoked(one.next_call(0.8), True, 0.9)
    assert one.next_call(0.9) is None, "another leads"
    one.seen(None, 4)
    assert one.next_call(1.0).step is Step.GRANT


def test_a_lease_that_is_gone_is_run_for_again_at_once():
    one = grown()
    one.renewed(one.next_call(0.5), 0.0, 0.6)
    assert one.epoch == 0
    assert one.next_call(0.6).step is Step.GRANT


def test_a_claim_without_an_answer_is_given_up_with_its_lease():
    one = Election(TTL_S)
    one.granted(one.next_call(0.0), Lease(7, TTL_S), 0.1)
    one.claimed(one.next_call(0.1), None, 0.6)
    call = one.next_call(1.0)
    assert (call.step, call.lease_id) == (Step.REVOKE, 7)
    one.seen(Entry(KEY, b"me", 20, 20, 7), 20)  # it was done after all
    assert one.epoch == 0
    one.revoked(call, True, 1.1)
    assert one.next_call(1.1).step is Step.GRANT


def test_who_resigns_gives_the_lease_back_and_runs_no_more():
    one = grown()
    one.resign()
    assert not one.leads(0.3)
    assert not one.has_released
    call = one.next_call(0.3)
    assert (call.step, call.lease_id) == (Step.REVOKE, 7)
    one.revoked(call, True, 0.4)
    assert one.has_released
    assert one.next_call(0.4) is None
    assert one.wake_at(0.4) is None


def test_a_grant_that_comes_after_the_resignation_is_given_back():
    one = Election(TTL_S)
    call = one.next_call(0.0)
    one.resign()
    one.granted(call, Lease(7, TTL_S), 0.1)
    call = one.next_call(0.1)
    assert (call.step, call.lease_id) == (Step.REVOKE, 7)


def test_a_higher_epoch_ends_a_lower_one():
    one = grown()
    one.outbid(20)
    assert one.epoch == 20
    one.outbid(21)
    assert one.epoch == 0
    call = one.next_call(0.3)
    assert (call.step, call.lease_id) == (Step.REVOKE, 7)
    one.revoked(call, True, 0.4)
    assert one.next_call(0.4) is None, "others go first"
    assert one.wake_at(0.4) == pytest.approx(0.4 + AGAIN_S)
    one.granted(one.next_call(1.0), Lease(8, TTL_S), 1.0)
    claim = CasResult(True, 2, Entry(KEY, b"me", 2, 2, 8))
    one.claimed(one.next_call(1.1), claim, 1.2, base=19)
    assert one.epoch == 0, "no higher than what was heard of"
    one.revoked(one.next_call(1.2), True, 1.3)
    one.granted(one.next_call(1.3), Lease(9, TTL_S), 1.4)
    one.claimed(one.next_call(1.4), CasResult(True, 4, Entry(KEY, b"me", 4, 4, 9)), 1.5, base=21)
    assert (one.epoch, one.revision) == (25, 4)


def test_another_claim_at_the_revision_of_ours_is_not_ours():
    one = grown()
    one.seen(Entry(KEY, b"me", 20, 30, 7), 30)
    assert one.epoch == 20
    one.seen(Entry(KEY, b"other", 20, 40, 8), 40)  # in a registry that lost its data
    assert one.epoch == 0
