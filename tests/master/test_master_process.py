"""A master that starts, loses and restarts worker processes; a master as a process."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.master.fake_router import FakeRouter
from tests.master.test_master_actor import expected, make_settings
from tests.master.worker_targets import (
    CRASH_TOKEN,
    FAIL_TOKEN,
    HANG_TOKEN,
    HOLD_TOKEN,
    run_computing_worker,
    run_crashing_worker,
    run_holding_worker,
    run_nothing,
    run_toy_master,
    run_toy_worker,
)
from xllm.config.load import encode_settings
from xllm.config.master import MasterSettings
from xllm.master.actor import MasterActor
from xllm.protocol.actor.children import Children, ChildSpec
from xllm.protocol.transport.context import Transport

pytestmark = pytest.mark.process


@contextlib.asynccontextmanager
async def running(run_dir, target=run_toy_worker):
    settings = dataclasses.replace(
        make_settings(run_dir, toy_step_ms=2.0), master=MasterSettings(name="i0")
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


def worker_pid(master) -> int:
    [pid] = master.workers.pids.values()
    return pid


async def serve_one(master, router, name) -> None:
    await router.until(lambda: master.models[0].state == "ready", 30)
    request = router.admit(name, range(20, 30))
    assert (await router.ends(name)).code == ""
    assert router.streams[name, 1, 0].tokens == expected(request)


def test_a_killed_worker_comes_back(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            router.admit("b", range(20, 30), max_tokens=200)
            await router.until(lambda: ("b", 1, 0) in router.streams)
            old = worker_pid(master)
            began = time.monotonic()
            os.kill(old, signal.SIGKILL)
            ended = await router.ends("b")
            assert ended.code == "unavailable" or (ended.code, ended.blameless) == (
                "worker_lost",
                True,
            )
            assert time.monotonic() - began < 1.0
            await serve_one(master, router, "c")
            assert worker_pid(master) != old

    asyncio.run(scenario())


def test_a_worker_that_crashes_may_have_been_given_the_reason(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            router.admit("b", range(20, 30), max_tokens=200)
            await router.until(lambda: ("b", 1, 0) in router.streams)
            os.kill(worker_pid(master), signal.SIGSEGV)
            ended = await router.ends("b")
            assert not ended.blameless
            assert "ended with -11" in ended.message
            await serve_one(master, router, "c")

    asyncio.run(scenario())


def test_company_of_the_reason_hears_so_and_a_request_that_runs_alone_has_none(run_dir):
    async def scenario():
        async with running(run_dir, run_crashing_worker) as (master, router):
            for name, alone in (("a", False), ("b", True)):
                await serve_one(master, router, f"{name}0")
                router.admit(name, range(20, 30), max_tokens=200)
                await router.until(lambda name=name: (name, 1, 0) in router.streams)
                router.admit(f"{name}1", [20, CRASH_TOKEN], alone=alone)
                ended = await router.ends(f"{name}1")
                assert (ended.code, ended.blameless) == ("worker_lost", False)
                assert ended.shared != alone
                other = await router.ends(name)
                assert (other.code, other.shared) == (
                    ("unavailable", False) if alone else ("worker_lost", True)
                )
            # The second end has its reason, and is none of the worker's.
            await serve_one(master, router, "c")
            assert len(master.workers._processes._restarts._ends) == 1

    asyncio.run(scenario())


def test_a_worker_whose_interpreter_is_held_is_seen_before_it_counts_as_silent(run_dir):
    async def scenario():
        async with running(run_dir, run_holding_worker) as (master, router):
            await serve_one(master, router, "a")
            router.admit("b", [20, HOLD_TOKEN])
            ended = await router.ends("b", timeout_s=30)
            assert (ended.code, ended.blameless) == ("worker_lost", False)
            assert "awake in a step" in ended.message
            await serve_one(master, router, "c")

    asyncio.run(scenario())


def test_a_frozen_worker_is_seen_and_replaced(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            began = time.monotonic()
            router.admit("b", [20, HANG_TOKEN])
            ended = await router.ends("b")
            assert (ended.code, ended.blameless) == ("worker_lost", False)
            assert 0.9 < time.monotonic() - began < 3.0
            await serve_one(master, router, "c")

    asyncio.run(scenario())


def test_a_stopped_worker_is_seen_within_a_second_or_so(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            router.admit("b", range(20, 30), max_tokens=200)
            await router.until(lambda: ("b", 1, 0) in router.streams)
            began = time.monotonic()
            os.kill(worker_pid(master), signal.SIGSTOP)
            ended = await router.ends("b")
            assert (ended.code, ended.blameless) == ("worker_lost", True)
            assert time.monotonic() - began < 2.5
            await serve_one(master, router, "c")

    asyncio.run(scenario())


@contextlib.contextmanager
def crowded(pid, policy):
    """The worker shares one CPU with a process that never sleeps; all its threads but the
    actor's, which is the first, are scheduled by `policy`."""
    cpu = min(os.sched_getaffinity(0))
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    for thread in threads:
        os.sched_setaffinity(thread, {cpu})
    with subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) as hog:
        try:
            os.sched_setaffinity(hog.pid, {cpu})
            for thread in threads:
                if thread != pid:
                    os.sched_setscheduler(thread, policy, os.sched_param(0))
            yield
            for thread in threads:
                with contextlib.suppress(ProcessLookupError):  # given up meanwhile
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        finally:
            hog.kill()


def test_a_worker_that_gets_no_cpu_is_not_taken_for_frozen(run_dir):
    async def scenario():
        async with running(run_dir, run_computing_worker) as (master, router):
            await serve_one(master, router, "a")
            pid = worker_pid(master)
            vigil = master.workers.links[0].vigil
            with crowded(pid, os.SCHED_IDLE):
                request = router.admit("b", range(30, 40), max_tokens=3)
                await router.until(lambda: vigil.heard_at - vigil._moved_at > 2.0, 60)
            assert (await router.ends("b")).code == ""
            assert router.streams["b", 1, 0].tokens == expected(request)
            assert worker_pid(master) == pid
            assert master.models[0].metrics.num_worker_ends == 0

    asyncio.run(scenario())


def test_a_frozen_worker_is_seen_on_a_busy_machine(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            router.admit("b", [20, HANG_TOKEN])
            vigil = master.workers.links[0].vigil
            await router.until(lambda: vigil._was_seen_standing)
            with crowded(worker_pid(master), os.SCHED_OTHER):
                began = time.monotonic()
                assert (await router.ends("b")).code == "worker_lost"
                assert time.monotonic() - began < 5.0

    asyncio.run(scenario())


def test_a_failed_step_costs_its_requests_only(run_dir):
    async def scenario():
        async with running(run_dir) as (master, router):
            await serve_one(master, router, "a")
            pid = worker_pid(master)
            router.admit("b", [20, FAIL_TOKEN])
            assert (await router.ends("b")).code == "engine_error"
            await serve_one(master, router, "c")
            assert worker_pid(master) == pid

    asyncio.run(scenario())


def test_a_worker_that_cannot_start_ends_the_master(run_dir):
    async def scenario():
        async with running(run_dir, run_nothing) as (master, router):
            await router.until(lambda: master.stopping, 30)
            assert master._exit_code == 64
            assert master.models[0].state == "failed"

    asyncio.run(scenario())


def test_a_master_process_drains_at_sigterm_and_leaves_nobody(run_dir):
    async def scenario():
        settings = dataclasses.replace(
            make_settings(run_dir, toy_step_ms=2.0), master=MasterSettings(name="i0")
        )
        ends = []
        children = Children(ends.append)
        children.start(ChildSpec("master", run_toy_master, (encode_settings(settings),)))
        transport = Transport()
        router = FakeRouter(transport, f"ipc://{run_dir}/i0-instance", f"ipc://{run_dir}/i0-bus")
        await router.until(lambda: any(b.state == "ready" for b in router.beats), 30)
        request = router.admit("a", range(20, 30), max_tokens=50)
        await router.until(lambda: router.streams)
        children.signal("master", signal.SIGTERM)
        assert (await router.ends("a")).code == ""
        assert router.streams["a", 1, 0].tokens == expected(request)
        await router.until(lambda: ends)
        assert ends[0].code == 0
        router.close()
        transport.close()

    asyncio.run(scenario())
