"""A master with several models: served at once by one worker, over one memory."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal

import pytest

from tests.master.fake_router import FakeRouter
from tests.master.test_master_actor import expected, make_settings
from tests.master.worker_targets import FAIL_TOKEN, run_toy_worker
from xllm.config.master import MasterSettings
from xllm.config.served_model import ModelSettings
from xllm.errors import ConfigError
from xllm.master.actor import MasterActor
from xllm.master.strategies.page_turns import PageTurns
from xllm.master.strategies.step_turns import StepTurns
from xllm.protocol.instance import SetSleep, SleepSet
from xllm.protocol.transport.context import Transport

NAMES = ("toy", "b")


class Running:
    """A master whose worker is a process, and a router for each model."""

    def __init__(self, master: MasterActor, routers: dict[str, FakeRouter]) -> None:
        self.master = master
        self.routers = routers
        self.models = {one.settings.model.name: one for one in master.models}

    async def ready(self) -> None:
        for name, router in self.routers.items():
            await router.until(lambda name=name: self.models[name].state == "ready", 30)

    async def serve(self, model: str, request_id: str, num: int = 8) -> None:
        router = self.routers[model]
        request = router.admit(request_id, range(20, 40), max_tokens=num)
        assert (await router.ends(request_id)).code == ""
        assert router.streams[request_id, 1, 0].tokens == expected(request)


@contextlib.asynccontextmanager
async def running(run_dir, **worker):
    settings = dataclasses.replace(
        make_settings(run_dir, **{"toy_step_ms": 1.0, **worker}),
        master=MasterSettings(name="i0"),
        model=ModelSettings(name="toy", more="b"),
    )
    transport = Transport()
    master = MasterActor(settings, run_toy_worker, transport)
    await master.open()
    routers = {
        name: FakeRouter(transport, one.conversation.endpoint, one.bus_endpoint, name)
        for name, one in zip(NAMES, master.models, strict=True)
    }
    try:
        one = Running(master, routers)
        await one.ready()
        yield one
    finally:
        await master.close()
        for router in routers.values():
            router.close()
        transport.close()


@pytest.mark.process
def test_both_are_served_at_once(run_dir):
    async def scenario():
        async with running(run_dir) as one:
            assert [m.name for m in one.master.models] == ["i0", "i0.1"]
            assert [m.record().model for m in one.master.models] == list(NAMES)
            await asyncio.gather(
                *(one.serve(name, f"r{i}", 30) for name in NAMES for i in range(4))
            )
            counts = [m.metrics.num_steps for m in one.master.models]
            assert min(counts) >= 30
            # Each speaks of its own load, and the worker's figures are said once.
            for name in NAMES:
                await one.routers[name].until(lambda name=name: one.routers[name].beats)
                assert one.routers[name].beats[-1].publisher == one.models[name].name

    asyncio.run(scenario())


@pytest.mark.process
def test_a_request_for_the_other_model_is_refused(run_dir):
    async def scenario():
        async with running(run_dir) as one:
            one.routers["b"].model = "toy"
            one.routers["b"].admit("a", range(20, 30))
            assert (await one.routers["b"].ends("a")).code == "model_not_found"

    asyncio.run(scenario())


@pytest.mark.process
def test_a_failed_step_is_the_fault_of_its_model(run_dir):
    async def scenario():
        async with running(run_dir) as one:
            one.routers["b"].admit("long", range(20, 30), max_tokens=100)
            await one.routers["b"].until(lambda: ("long", 1, 0) in one.routers["b"].streams)
            one.routers["toy"].admit("bad", (20, FAIL_TOKEN, 21))
            assert (await one.routers["toy"].ends("bad")).code == "engine_error"
            assert (await one.routers["b"].ends("long")).code == ""
            await one.serve("toy", "next")

    asyncio.run(scenario())


@pytest.mark.process
def test_both_come_back_with_their_worker(run_dir):
    async def scenario():
        async with running(run_dir) as one:
            for name in NAMES:
                one.routers[name].admit("long", range(20, 30), max_tokens=200)
                await one.routers[name].until(
                    lambda name=name: ("long", 1, 0) in one.routers[name].streams
                )
            [pid] = one.master.workers.pids.values()
            os.kill(pid, signal.SIGKILL)
            for name in NAMES:
                ended = await one.routers[name].ends("long")
                assert ended.code in ("worker_lost", "unavailable")
            await one.ready()
            for name in NAMES:
                await one.serve(name, "after")

    asyncio.run(scenario())


async def set_sleep(one, model: str, asleep: bool, **how) -> SleepSet:
    router = one.routers[model]
    nonce = len(router.answers) + 1
    router.send(SetSleep(nonce, asleep, **how))
    return await router.answer(SleepSet)


@pytest.mark.process
@pytest.mark.parametrize("drop_weights", [False, True])
def test_a_model_sleeps_wakes_and_sleeps_through_the_loss_of_its_worker(run_dir, drop_weights):
    async def scenario():
        async with running(run_dir) as one:
            toy, b = one.routers["toy"], one.routers["b"]
            await one.serve("b", "before")
            b.admit("cut", range(20, 30), max_tokens=200)
            await b.until(lambda: ("cut", 1, 0) in b.streams)
            assert await set_sleep(one, "b", True, drop_weights=drop_weights) == SleepSet(1)
            cut = await b.ends("cut")
            assert (cut.code, cut.message) == ("unavailable", "the model b goes to sleep")
            await b.until(lambda: b.beats[-1].state == "asleep")
            scheduler = one.models["toy"].scheduler
            assert scheduler.statistics().num_available_blocks == 64
            b.admit("no", range(20, 30))
            assert (await b.ends("no")).message == "the model b is asleep"
            await one.serve("toy", "other", 30)

            [pid] = one.master.workers.pids.values()
            os.kill(pid, signal.SIGKILL)
            await toy.until(lambda: one.models["toy"].state == "loading")
            await toy.until(lambda: one.models["toy"].state == "ready", 30)
            assert one.models["b"].state == "asleep"
            await one.serve("toy", "again", 30)

            b.answers.clear()
            assert (await set_sleep(one, "b", False)).code == ""
            await one.serve("b", "after", 30)
            await one.serve("toy", "both", 30)

    asyncio.run(scenario())


@pytest.mark.process
def test_what_runs_may_end_before_the_sleep(run_dir):
    async def scenario():
        async with running(run_dir) as one:
            b = one.routers["b"]
            request = b.admit("long", range(20, 30), max_tokens=60)
            await b.until(lambda: ("long", 1, 0) in b.streams)
            assert (await set_sleep(one, "b", True, timeout_ms=10_000)).code == ""
            assert (await b.ends("long")).code == ""
            assert b.streams["long", 1, 0].tokens == expected(request)

    asyncio.run(scenario())


@pytest.mark.process
def test_a_wake_that_the_worker_does_not_live_to_answer_fails(run_dir):
    async def scenario():
        async with running(run_dir) as one:
            assert (await set_sleep(one, "b", True)).code == ""
            one.routers["b"].answers.clear()
            [pid] = one.master.workers.pids.values()
            os.kill(pid, signal.SIGSTOP)
            waking = asyncio.ensure_future(set_sleep(one, "b", False))
            await one.routers["b"].until(lambda: one.master.sleeping._waking is not None)
            os.kill(pid, signal.SIGKILL)
            answer = await waking
            assert (answer.code, answer.message) == ("unavailable", "the worker is lost")
            await one.routers["toy"].until(lambda: one.models["toy"].state == "ready", 30)
            await one.serve("toy", "goes on")
            assert one.models["b"].state == "asleep"

    asyncio.run(scenario())


def test_models_share_a_worker_of_one_rank(run_dir):
    settings = dataclasses.replace(
        make_settings(run_dir),
        master=MasterSettings(name="i0", num_workers=2),
        model=ModelSettings(name="toy", more="b"),
    )
    with pytest.raises(ConfigError, match="share one worker"):
        MasterActor(settings, run_toy_worker)


def test_time_is_shared_evenly_whatever_a_step_takes() -> None:
    turns = StepTurns(("slow", "fast"), 2)
    under_way: list[str] = []
    spent = {"slow": 0.0, "fast": 0.0}
    for _ in range(400):
        while turns.has_room:
            model = turns.order()[0]
            turns.sent(model)
            under_way.append(model)
        model = under_way.pop(0)
        seconds = 1.0 if model == "slow" else 0.1
        spent[model] += seconds
        turns.done(model, seconds)
    assert abs(spent["slow"] - spent["fast"]) <= 2.0


def test_who_was_idle_neither_overtakes_nor_waits() -> None:
    turns = StepTurns(("a", "b"), 1)
    for _ in range(50):
        turns.sent("a")
        turns.done("a", 1.0)
    order = []
    for _ in range(10):
        model = turns.order()[0]
        turns.sent(model)
        turns.done(model, 1.0)
        order.append(model)
    assert order[0] == "b"
    assert order.count("a") in (4, 5)
    turns.sent("a")
    turns.forget("a")
    assert turns.has_room


def test_pages_go_to_whoever_waits_longest() -> None:
    turns = PageTurns()
    assert turns.may_start("a")
    turns.lacks("a")
    turns.lacks("a")
    assert not turns.may_start("b")  # and is in line now
    assert not turns.may_start("c")
    assert turns.may_start("a")
    turns.leave("a")  # it started one
    assert not turns.may_start("a")
    assert turns.may_start("b")
    turns.leave("b")
    turns.leave("b")
    assert turns.may_start("c")
