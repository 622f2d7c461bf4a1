"""Several workers as one: merged reports and results, and what a lost rank does to the others."""

import asyncio
import contextlib
import dataclasses
import os
import signal

import pytest

from tests.master.fake_router import FakeRouter
from tests.master.test_master_actor import make_settings
from tests.master.test_master_process import serve_one
from tests.master.worker_targets import FAIL_TOKEN, run_talking_worker, run_toy_worker
from xllm.config.master import MasterSettings
from xllm.errors import ConfigError, EngineError
from xllm.master.actor import MasterActor
from xllm.master.ranks import RankResults, merge_ready
from xllm.protocol.step import StepResult, WorkerReady
from xllm.protocol.transport.context import Transport


def ready(rank: int, **fields) -> WorkerReady:
    plain = {"model": "m", "num_blocks": 10, "block_size": 16, "max_model_len": 100}
    plain |= {"vocab_size": 9, "eos_ids": (1,), "revision": "r", "fingerprint": "f", "load_s": 1.0}
    return WorkerReady(rank=rank, **{**plain, **fields})


def test_an_instance_can_do_what_its_least_rank_can():
    merged = merge_ready([ready(0), ready(1, num_blocks=7, max_model_len=90, load_s=3.0)])
    assert (merged.num_blocks, merged.max_model_len, merged.load_s) == (7, 90, 3.0)


@pytest.mark.parametrize("name", ["revision", "fingerprint", "block_size", "vocab_size"])
def test_ranks_that_loaded_something_else_are_refused(name):
    other = ready(1, **{name: 8 if name in ("block_size", "vocab_size") else "x"})
    with pytest.raises(ConfigError, match=name):
        merge_ready([ready(0), other])


def test_a_step_is_there_once_all_ranks_gave_it():
    results = RankResults(3)
    assert results.add(2, StepResult(5, ((1,),), 30), []) is None
    assert results.add(0, StepResult(5, ((1,),), 10), [b"frame"]) is None
    assert results.add(0, StepResult(6, ((2,),), 10), [b"next"]) is None
    merged = results.add(1, StepResult(5, ((1,),), 20), [b"other"])
    assert merged == (StepResult(5, ((1,),), 30), [b"frame"])
    assert results.num_open == 1


def test_ranks_that_draw_other_tokens_are_found_out():
    results = RankResults(2)
    results.add(0, StepResult(5, ((1,),)), [])
    with pytest.raises(EngineError, match="disagree"):
        results.add(1, StepResult(5, ((2,),)), [])


@contextlib.asynccontextmanager
async def running(run_dir, num_workers=2, target=run_toy_worker):
    settings = dataclasses.replace(
        make_settings(run_dir, toy_step_ms=2.0),
        master=MasterSettings(name="i0", num_workers=num_workers),
    )
    transport = Transport()
    master = MasterActor(settings, target, transport)
    await master.open()
    router = FakeRouter(
        transport, master.models[0].conversation.endpoint, master.models[0].bus_endpoint
    )
    try:
        yield master, router
    finally:
        await master.close()
        router.close()
        transport.close()


@pytest.mark.process
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_comes_back_and_the_other_one_stays(run_dir, killed):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            router.admit("b", range(20, 30), max_tokens=200)
            await router.until(lambda: ("b", 1, 0) in router.streams)
            before = dict(master.workers.pids)
            assert len(before) == 2
            os.kill(before[f"i0/worker-{killed}"], signal.SIGKILL)
            assert (await router.ends("b")).code in ("worker_lost", "unavailable")
            await serve_one(master, router, "c")
            after = master.workers.pids
            stayed = f"i0/worker-{1 - killed}"
            assert after[stayed] == before[stayed]
            assert after[f"i0/worker-{killed}"] != before[f"i0/worker-{killed}"]

    asyncio.run(scenario())


@pytest.mark.process
def test_a_plan_has_left_for_every_rank_before_the_next_is_made(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            workers = master.workers
            send_plan, waited = master._sleeping._pump._send_plan, []

            def watched(plan):
                send_plan(plan)
                waited.append(workers._socket.statistics().num_queued)

            master._sleeping._pump._send_plan = watched
            await serve_one(master, router, "b")
            assert waited
            assert set(waited) == {0}

    asyncio.run(scenario())


@pytest.mark.process
def test_ranks_meet_anew_after_a_step_that_failed(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            before = dict(master.workers.pids)
            router.admit("b", [20, FAIL_TOKEN])
            assert (await router.ends("b")).code == "worker_lost"
            await serve_one(master, router, "c")
            assert master.workers.pids == before

    asyncio.run(scenario())


@pytest.mark.process
def test_ranks_talk_by_way_of_the_master_whenever_they_meet(run_dir):
    async def scenario():
        async with running(run_dir, target=run_talking_worker) as (master, router):
            await serve_one(master, router, "a")
            before = dict(master.workers.pids)
            os.kill(before["i0/worker-1"], signal.SIGKILL)
            await router.until(
                lambda: master.workers.pids.get("i0/worker-1") not in (None, before["i0/worker-1"]),
                30,
            )
            await serve_one(master, router, "b")
            assert master.workers.pids["i0/worker-0"] == before["i0/worker-0"]

    asyncio.run(scenario())
