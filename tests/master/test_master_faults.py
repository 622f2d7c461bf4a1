"""What a master does when something is wrong: broken state, deaf routers, long steps."""

import asyncio
import dataclasses
import time

import pytest
import structlog

from tests.master.test_master_actor import Stage, expected, make_settings, stage
from xllm.errors import BackpressureError, InvariantError
from xllm.master.workers import WorkerGroup
from xllm.protocol.actor.base import Actor
from xllm.protocol.instance import CancelRequest, ProbeAnswer, ProbeInstance, ReleaseHold
from xllm.protocol.transport.context import Transport


def test_a_probe_in_a_long_step_is_answered_from_its_pulses(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=2000.0) as one:
            one.router.admit("a", range(20, 30), max_tokens=1)
            await one.router.until(lambda: one.master.workers.shows_work)
            one.router.send(ProbeInstance(5))
            answer = await one.router.answer(ProbeAnswer)
            assert (answer.nonce, answer.ok) == (5, True)
            assert "a" not in {name for name, _ in one.router.ended}
            assert (await one.router.ends("a")).code == ""

    asyncio.run(scenario())


def test_pulses_do_not_wait_for_slow_heartbeats(run_dir):
    async def scenario():
        settings = make_settings(run_dir)
        cluster = dataclasses.replace(settings.cluster, heartbeat_s=10.0)
        one = Stage(dataclasses.replace(settings, cluster=cluster))
        await one.start()
        heard = set()
        began = time.monotonic()

        def has_heard() -> bool:
            heard.add(one.master.workers.links[0].vigil.heard_at)
            return len(heard) >= 4

        await one.router.until(has_heard)
        assert time.monotonic() - began < 4.0
        await one.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["schedule", "update", "expire", "admit"])
@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), InvariantError("story")])
def test_a_scheduler_that_breaks_ends_the_process_and_its_requests(run_dir, method, error):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            one.transport.on_fatal = one.master._fatal
            one.router.admit("a", range(20, 30), max_tokens=200)
            await one.router.until(lambda: one.router.streams)

            def broken(*args):
                raise error

            setattr(one.master.models[0].scheduler, method, broken)
            one.router.admit("b", range(20, 30))
            assert (await one.router.ends("a")).code == "worker_lost"
            assert one.master.stopping
            assert one.master._exit_code == 70
            assert one.master.models[0].state == "failed"
            assert len(one.master.models[0].conversation.routes) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["schedule", "update", "expire", "admit"])
@pytest.mark.parametrize("num_others", [0, 1])
def test_what_is_open_where_a_scheduler_breaks_hears_whether_it_was_in_company(
    run_dir, method, num_others
):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            one.transport.on_fatal = one.master._fatal
            names = ["a", "b"][: 1 + num_others]
            for name in names:
                one.router.admit(name, range(20, 30), max_tokens=1000)
            await one.router.until(lambda: len(one.router.streams) == len(names))

            def broken(*args):
                raise KeyError("x")

            setattr(one.master.models[0].scheduler, method, broken)
            if method == "admit":  # it is open from then on as the others are
                names.append("c")
                one.router.admit("c", range(20, 30))
            for name in names:
                ended = await one.router.ends(name)
                assert (ended.code, ended.shared) == ("worker_lost", len(names) > 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("num_others", [0, 2])
def test_the_requests_of_a_failed_step_hear_whether_they_were_several(run_dir, num_others):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            names = ["a", "b", "c"][: 1 + num_others]
            for name in names:
                one.router.admit(name, range(20, 30), max_tokens=1000)
            await one.router.until(lambda: len(one.router.streams) == len(names))
            settle = one.master.models[0].steps.settle
            one.master.models[0].steps.settle = lambda result, frames: settle(
                with_one_more(result), frames
            )
            for name in names:
                ended = await one.router.ends(name)
                assert (ended.code, ended.shared) == ("engine_error", num_others > 0)

    asyncio.run(scenario())


def test_a_result_that_contradicts_its_plan_costs_the_step_only(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            one.router.admit("a", range(20, 30), max_tokens=200)
            await one.router.until(lambda: one.router.streams)
            settle = one.master.models[0].steps.settle
            one.master.models[0].steps.settle = lambda result, frames: settle(
                with_one_more(result), frames
            )
            assert (await one.router.ends("a")).code == "engine_error"
            del one.master.models[0].steps.settle
            request = one.router.admit("b", range(20, 30))
            assert (await one.router.ends("b")).code == ""
            assert one.router.streams["b", 1, 0].tokens == expected(request)

    asyncio.run(scenario())


def with_one_more(result):
    """The result of a plan with one more item."""
    return type(result)(result.step, (*result.tokens, (1,)))


class DeafSocket:
    """Takes nothing for a while."""

    def __init__(self, socket) -> None:
        self.socket = socket
        self.is_full = True

    def send(self, router, message) -> None:
        if self.is_full:
            raise BackpressureError("full")
        self.socket.send(router, message)

    def close(self) -> None:
        self.socket.close()


def test_a_router_that_reads_again_hears_what_became_void(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            conversation = one.master.models[0].conversation
            one.router.admit("a", range(20, 30), max_tokens=200)
            await one.router.until(lambda: one.router.streams)
            deaf = conversation._socket = DeafSocket(conversation._socket)
            one.router.admit("b", range(20, 30), attempt=3, max_tokens=1)
            await one.router.until(
                lambda: [*map(sorted, conversation._voids.values())] == [["a", "b"]]
            )
            await one.router.until(lambda: one.master.models[0].steps.num_open == 0)
            assert not one.router.ended
            deaf.is_full = False
            assert (await one.router.ends("a")).code == "unavailable"
            assert (await one.router.ends("b", 3)).code == "unavailable"
            assert not conversation._voids
            request = one.router.admit("a", range(20, 30), attempt=2)
            assert (await one.router.ends("a", 2)).code == ""
            assert one.router.streams["a", 2, 0].tokens == expected(request)

    asyncio.run(scenario())


def test_an_attempt_that_runs_for_another_connection_is_a_conflict(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            other = one.make_router()
            request = one.router.admit("a", range(20, 30), max_tokens=30)
            await one.router.until(lambda: one.router.streams)
            one.router.send(request)
            other.send(request)
            assert (await other.ends("a")).code == "conflict"
            assert (await one.router.ends("a")).code == ""
            assert one.router.streams["a", 1, 0].tokens == expected(request)
            assert not other.streams

    asyncio.run(scenario())


def test_another_connection_ends_no_request(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            other = one.make_router()
            request = one.router.admit("a", range(20, 30), max_tokens=30)
            await one.router.until(lambda: one.router.streams)
            with structlog.testing.capture_logs() as logs:
                for attempt in (1, 7):
                    for choice in (-1, 0):
                        other.send(CancelRequest("a", attempt, choice))
                    other.send(ReleaseHold("a", attempt))
                other.send(CancelRequest("a", 0))  # of an attempt before: late, and no forgery
                other.send(CancelRequest("unknown", 1))
                assert (await one.router.ends("a")).code == ""
            assert one.router.streams["a", 1, 0].tokens == expected(request)
            assert one.transport.num_refused == 6
            assert [line["event"] for line in logs].count("router_speaks_for_another") == 1
            one.router.admit("b", range(20, 30), max_tokens=200)
            await one.router.until(lambda: ("b", 1, 0) in one.router.streams)
            one.router.send(CancelRequest("b", 1))
            await one.router.until(lambda: not len(one.master.models[0].conversation.routes))

    asyncio.run(scenario())


class ListedChildren:
    """Children that live on whatever happens, and the signals that they were sent."""

    def __init__(self, name: str) -> None:
        self.pids = {name: 4_000_000}
        self.signals = []

    def signal(self, name, number) -> None:
        self.signals.append(number)

    def start(self, spec) -> None:
        pass

    async def stop_all(self, timeout_s) -> None:
        pass


class Deaf:
    """A worker's owner that minds nothing."""

    def worker_lost(self, reason, by_itself) -> None:
        pass


def test_a_worker_that_loses_its_connection_gets_its_time_anew(run_dir):
    async def scenario():
        settings = make_settings(run_dir)
        settings = dataclasses.replace(
            settings, master=dataclasses.replace(settings.master, worker_start_s=1.0)
        )
        transport = Transport()
        actor = Actor("i0", transport)
        group = WorkerGroup(actor, Deaf(), settings, f"ipc://{run_dir}/w", lambda data: None)
        group._processes._children = children = ListedChildren("i0/worker-0")
        group.start()
        [link] = group.links
        link.started_at -= 100.0
        link.identity = b"worker"
        group._on_gone(b"worker")
        group._check()
        assert not children.signals
        link.started_at -= 100.0
        group._check()
        assert children.signals
        await group.stop()
        await actor.close()
        transport.close()

    asyncio.run(scenario())
