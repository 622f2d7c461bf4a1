"""Two processes of one name: who has it, who waits, who is refused, who steps down."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from xllm.config.cluster import ClusterSettings
from xllm.errors import NameTakenError
from xllm.protocol.codec import encode
from xllm.protocol.registry import holder, keeper
from xllm.protocol.registry.holder import Holder, NameClaim, NameState, has_ended, own_process
from xllm.protocol.registry.keeper import Registration, register
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import Entry

KEY = "/xllm/default/instances/me"
TTL_S = 5.0
PATIENCE_S = 2 * TTL_S + 2


def entry(incarnation="1", process="", lease_id=7, value=None):
    text = encode(Holder(incarnation=incarnation, process=process)) if value is None else value
    return Entry(KEY, text, 3, 4, lease_id)


def claim(ended=()):
    return NameClaim("2", TTL_S, lambda process: process in ended)


# -- the decision -------------------------------------------------------------------------------


def test_whose_key_may_be_written():
    assert claim().judge(None, 0, 0.0, 0.0) is NameState.FREE
    assert claim().judge(entry("2"), 0, 0.0, 0.0) is NameState.FREE  # ours, of an earlier try
    assert claim().judge(entry("1", lease_id=9), 9, 0.0, 0.0) is NameState.FREE
    assert claim({"p"}).judge(entry("1", "p"), 0, 0.0, 0.0) is NameState.FREE
    assert claim({"p"}).judge(entry("1", "q"), 0, 0.0, 0.0) is NameState.HELD
    assert claim().judge(entry(value=b"\xc1"), 0, 0.0, 0.0) is NameState.HELD
    assert NameClaim("", TTL_S).judge(entry(""), 0, 0.0, 0.0) is NameState.HELD


def waits(one, begin, seconds, lease_id=7):
    """The last of looks a second apart, each answered at once."""
    for step in range(int(seconds) + 1):
        state = one.judge(entry(lease_id=lease_id), 0, begin + step, begin + step)
    return state


def test_who_outlives_two_leases_lives():
    one = claim()
    assert waits(one, 1.0, PATIENCE_S) is NameState.HELD
    assert one.judge(entry(), 0, 1.1 + PATIENCE_S, 1.1 + PATIENCE_S) is NameState.TAKEN
    # Another owner, or the same name after it was free, is waited for anew.
    assert waits(one, 14.0, PATIENCE_S, 8) is NameState.HELD
    assert one.judge(None, 0, 27.0, 27.0) is NameState.FREE
    assert waits(one, 28.0, PATIENCE_S, 8) is NameState.HELD
    assert waits(one, 41.0, 0, 8) is NameState.TAKEN


def test_the_time_of_an_outage_does_not_count():
    one = claim()
    assert waits(one, 0.0, PATIENCE_S) is NameState.HELD
    one.unanswered()
    assert waits(one, 13.0, PATIENCE_S) is NameState.HELD
    # An answer that took long: nobody could renew meanwhile either.
    assert one.judge(entry(), 0, 25.5, 33.0) is NameState.HELD
    assert waits(one, 33.5, PATIENCE_S - 1) is NameState.HELD
    # Nobody looked.
    assert waits(one, 60.0, PATIENCE_S) is NameState.HELD
    assert waits(one, 60.0 + PATIENCE_S + 1, 0) is NameState.TAKEN


def test_who_may_be_draining_is_waited_for():
    one = NameClaim("2", TTL_S, lambda process: False, drain_s=15.0)
    assert waits(one, 0.0, PATIENCE_S + 15.0) is NameState.HELD
    assert waits(one, PATIENCE_S + 16.0, 0) is NameState.TAKEN


def test_a_lease_is_as_long_as_the_registry_gives_it():
    one = NameClaim("2", 4.5, lambda process: False)
    assert waits(one, 0.0, PATIENCE_S) is NameState.HELD  # etcd has whole seconds
    one.granted(8.0)
    assert waits(one, 13.0, 5.0) is NameState.HELD
    assert waits(one, 19.0, 0) is NameState.TAKEN


def test_a_claim_that_was_frozen_while_it_asked_judges_by_when_it_asked():
    one = claim()
    assert one.judge(entry(), 0, 0.0, 1000.0) is NameState.HELD
    assert one.judge(entry(), 0, 1001.0, 9999.0) is NameState.HELD


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["none", "ours", "ended", "rival", "other rival"]),
            st.sampled_from([0.1, 1.0, 1.9, 2.1, 2 * PATIENCE_S]),
        ),
        max_size=60,
    )
)
def test_nobody_who_may_live_loses_the_name_and_nobody_waits_for_ever(looks):
    kinds = {
        "none": None,
        "ours": entry("2"),
        "ended": entry("1", "p"),
        "rival": entry("1", "q"),
        "other rival": entry("3", "r", lease_id=8),
    }
    one, now, since, last = claim({"p"}), 0.0, 0.0, ""
    for kind, pause_s in looks:
        now += pause_s
        since = since if kind == last and pause_s <= holder._APART_S else now
        last = kind
        state = one.judge(kinds[kind], 0, now, now)
        if "rival" not in kind:
            assert state is NameState.FREE
        else:
            waited = now - since > PATIENCE_S
            assert state is (NameState.TAKEN if waited else NameState.HELD)


# -- processes ----------------------------------------------------------------------------------


def test_whether_a_process_has_ended_is_known_on_its_machine():
    ours = own_process()
    place, pid, started = ours.rsplit("/", 2)
    assert int(pid) == os.getpid()
    assert not has_ended(ours)
    assert has_ended(f"{place}/{pid}/{int(started) - 1}")  # another one had that id
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        theirs = f"{place}/{child.pid}/{holder._start_of(child.pid)}"
        assert not has_ended(theirs)
        child.kill()
        deadline = time.monotonic() + 20
        while not has_ended(theirs):  # a zombie has ended too
            assert time.monotonic() < deadline
        assert holder._start_of(child.pid) == "ended"
    finally:
        child.kill()
        child.communicate()
    assert has_ended(theirs)


@pytest.mark.parametrize(
    "process",
    ["", "/", "//", "a/b/1/1", "x/pid:[1]/17/3", "{place}/x/1", "{place}/-1/1", "{place}/1"],
)
def test_of_what_cannot_be_looked_for_nothing_is_known(process):
    place = own_process().rsplit("/", 2)[0]
    assert not has_ended(process.format(place=place))


def test_of_another_time_namespace_nothing_is_known():
    """Start times differ there, of one and the same process."""
    boot, pids, times, pid, started = own_process().split("/")
    assert times.startswith("time:")
    assert has_ended(f"{boot}/{pids}/{times}/{pid}/{int(started) + 1}")
    assert not has_ended(f"{boot}/{pids}/time:[1]/{pid}/{int(started) + 1}")
    assert not has_ended(f"{boot}/pid:[1]/{times}/{pid}/{int(started) + 1}")
    assert not has_ended(f"{boot}x/{pids}/{times}/{pid}/{int(started) + 1}")


def test_another_users_process_lives():
    place = own_process().rsplit("/", 2)[0]
    assert not has_ended(f"{place}/1/{holder._start_of(1)}")


# -- registrations ------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(test):
    """Runs a coroutine function with a registry whose leases never end by themselves, and a clock
    that only moves by hand."""

    async def main():
        registry = LocalRegistry(RegistryStore(), lambda: 0.0)
        async with asyncio.timeout(20):
            await test(registry, Clock())
        await registry.close()

    asyncio.run(main())


def of(registry, incarnation, clock, *, process=None, told=None):
    record = Holder(incarnation=incarnation, process=own_process() if process is None else process)
    return Registration(
        registry,
        KEY,
        lambda: encode(record),
        TTL_S,
        incarnation=incarnation,
        setting="master.name",
        on_replaced=told,
        clock=clock,
    )


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(keeper, "_RENEWAL_S", 0.01)
    monkeypatch.setattr(keeper, "_MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(keeper, "_LOOK_S", 0.0)
    monkeypatch.setattr(keeper, "HELD_PAUSE_S", 0.01)


@pytest.mark.usefixtures("quick")
def test_the_later_of_two_that_live_is_refused_and_told_what_to_do():
    async def test(registry, clock):
        told = []
        first = of(registry, "first", clock, told=told.append)
        assert await first.attempt()
        second = of(registry, "second", clock)
        starting = asyncio.create_task(register(ClusterSettings(), second))
        with structlog.testing.capture_logs() as logs:
            while not logs:
                await asyncio.sleep(0.01)
            while not starting.done():
                clock.now += 0.5
                await asyncio.sleep(0.01)
            with pytest.raises(NameTakenError) as caught:
                await starting
        assert [line["event"] for line in logs] == ["name_awaited"]
        message = caught.value.message
        assert "'me'" in message
        assert KEY in message
        assert f"process {os.getpid()} of this machine (incarnation first" in message
        assert "another master.name" in message
        assert (caught.value.param, caught.value.exit_code) == ("master.name", 64)
        assert (await registry.get(KEY)).lease_id == first.lease_id
        assert registry.store.statistics().num_leases == 1
        assert told == []
        await first.withdraw()

    run(test)


@pytest.mark.usefixtures("quick")
def test_who_follows_a_dead_one_of_this_machine_has_its_name_at_once():
    async def test(registry, clock):
        place, pid, started = own_process().rsplit("/", 2)
        dead = of(registry, "dead", clock, process=f"{place}/{pid}/{int(started) - 1}")
        assert await dead.attempt()
        dead._task.cancel()
        again = of(registry, "again", clock)
        assert await again.attempt()
        assert (await registry.get(KEY)).lease_id == again.lease_id
        await again.withdraw()
        assert await registry.get(KEY) is None

    run(test)


@pytest.mark.usefixtures("quick")
def test_who_follows_a_dead_one_of_elsewhere_has_its_name_when_the_lease_ends():
    async def test(registry, clock):
        dead = of(registry, "dead", clock, process="elsewhere/pid:[1]/17/3")
        assert await dead.attempt()
        dead._task.cancel()
        again = of(registry, "again", clock)
        starting = asyncio.create_task(register(ClusterSettings(), again))
        for _ in range(5):
            assert not await again.is_free()
        assert not starting.done()
        await registry.revoke(dead.lease_id)
        await starting
        assert (await registry.get(KEY)).lease_id == again.lease_id
        await again.withdraw()

    run(test)


@pytest.mark.usefixtures("quick")
def test_who_lost_its_lease_and_then_its_name_steps_down_once():
    async def test(registry, clock):
        told = []
        first = of(registry, "first", clock, told=told.append)
        assert await first.attempt()
        second = of(registry, "second", clock)
        # As of a process that did not run: its lease ends, and another one is there before it.
        await registry.revoke(first.lease_id)
        assert await second.attempt()
        with structlog.testing.capture_logs() as logs:
            while not told:
                clock.now += 1
                await asyncio.sleep(0.01)
        assert [line["event"] for line in logs if line["event"] == "name_taken"] == ["name_taken"]
        assert len(told) == 1
        assert KEY in told[0]
        assert (await registry.get(KEY)).lease_id == second.lease_id
        await first.withdraw()
        assert (await registry.get(KEY)).lease_id == second.lease_id
        await second.withdraw()

    run(test)


@pytest.mark.usefixtures("quick")
def test_a_record_that_was_written_over_comes_back_once_the_other_went():
    async def test(registry, clock):
        told = []
        first = of(registry, "first", clock, told=told.append)
        assert await first.attempt()
        lease = await registry.grant(60.0)
        await registry.put(KEY, encode(Holder(incarnation="old")), lease.id)  # asks nobody
        with structlog.testing.capture_logs() as logs:
            while not any(line["event"] == "name_awaited" for line in logs):
                await asyncio.sleep(0.01)
        await registry.revoke(lease.id)
        while (found := await registry.get(KEY)) is None:
            await asyncio.sleep(0.01)
        assert found.lease_id == first.lease_id
        assert told == []
        await first.withdraw()

    run(test)


@pytest.mark.usefixtures("quick")
def test_an_older_process_that_writes_over_a_record_replaces_its_owner():
    """Of before names were compared: it asks nobody, and renews its own lease."""

    async def test(registry, clock):
        told = []
        first = of(registry, "first", clock, told=told.append)
        assert await first.attempt()
        lease = await registry.grant(60.0)
        await registry.put(KEY, encode(Holder(incarnation="old")), lease.id)
        began = clock.now
        while not told:
            assert await registry.keep_alive(lease.id)
            clock.now += 0.5
            await asyncio.sleep(0.01)
        assert clock.now - began >= 2 * TTL_S + 2
        assert (await registry.get(KEY)).lease_id == lease.id
        await first.withdraw()
        assert (await registry.get(KEY)).lease_id == lease.id

    run(test)
