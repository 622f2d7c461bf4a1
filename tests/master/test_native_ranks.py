"""A master with two native workers: the tokens of one worker, also after a rank was lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest

from tests.fixtures.models import make_model
from tests.master.fake_router import FakeRouter
from tests.worker.native.plan_driver import random_prompts
from tests.worker.native.reference import assert_greedy, load_reference
from xllm.config.cluster import ClusterSettings
from xllm.config.master import MasterSettings
from xllm.config.scheduling import SchedulerSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.master.actor import MasterActor
from xllm.protocol.transport.context import Transport
from xllm.worker.process import main as run_worker

pytestmark = pytest.mark.process

NUM_TOKENS = 20
START_S = 90.0


def make_settings(run_dir, directory, **worker) -> Settings:
    return Settings(
        cluster=ClusterSettings(run_dir=str(run_dir), heartbeat_s=0.02, shutdown_s=5.0),
        model=ModelSettings(name="toy", path=str(directory)),
        scheduler=SchedulerSettings(max_num_seqs=16, max_num_batched_tokens=64),
        master=MasterSettings(name="i0", num_workers=2),
        worker=WorkerSettings(device="cpu", num_threads=1, kv_cache_bytes=4 << 20, **worker),
    )


@contextlib.asynccontextmanager
async def running(settings):
    transport = Transport()
    master = MasterActor(settings, run_worker, transport)
    await master.open()
    router = FakeRouter(
        transport, master.models[0].conversation.endpoint, master.models[0].bus_endpoint
    )
    try:
        await router.until(lambda: master.models[0].state == "ready", START_S)
        yield master, router
    finally:
        await master.close()
        router.close()
        transport.close()


class Checker:
    """Sends prompts all at once and holds what comes back to the reference."""

    def __init__(self, directory, router) -> None:
        self._reference = load_reference(directory)
        self._router = router
        self._prompts = random_prompts(5, 1, 100)
        self._prompts.append([*self._prompts[0], *self._prompts[0]])

    async def check(self, name: str) -> None:
        for number, prompt in enumerate(self._prompts):
            self._router.admit(
                f"{name}-{number}",
                prompt,
                max_tokens=NUM_TOKENS,
                temperature=0.0,
                ignore_eos=True,
            )
        for number, prompt in enumerate(self._prompts):
            ended = await self._router.ends(f"{name}-{number}", timeout_s=60.0)
            assert ended.code == ""
            stream = self._router.streams[f"{name}-{number}", 1, 0].tokens
            assert len(stream) == NUM_TOKENS
            assert assert_greedy(self._reference, prompt, stream) <= 1


def test_two_workers_are_one_and_a_lost_rank_comes_back(run_dir, tmp_path):
    directory = make_model("qwen3", tmp_path / "model")

    async def scenario() -> None:
        async with running(make_settings(run_dir, directory)) as (master, router):
            checker = Checker(directory, router)
            await checker.check("a")
            before = dict(master.workers.pids)
            assert len(before) == 2
            router.admit("b", range(20, 30), max_tokens=900, ignore_eos=True)
            await router.until(lambda: ("b", 1, 0) in router.streams)
            os.kill(before["i0/worker-0"], signal.SIGKILL)
            assert (await router.ends("b", timeout_s=30.0)).code in ("worker_lost", "unavailable")
            await router.until(lambda: master.models[0].state == "ready", START_S)
            await checker.check("c")
            after = master.workers.pids
            assert after["i0/worker-1"] == before["i0/worker-1"]  # with its weights
            assert after["i0/worker-0"] != before["i0/worker-0"]

    asyncio.run(scenario())


def test_a_rank_that_stops_is_replaced(run_dir, tmp_path):
    """The other one waits for it in the middle of a layer, and is not taken for frozen."""
    directory = make_model("llama", tmp_path / "model", attention_bias=True, mlp_bias=True)

    async def scenario() -> None:
        settings = make_settings(run_dir, directory, kv_memory="paged")
        async with running(settings) as (master, router):
            checker = Checker(directory, router)
            await checker.check("a")
            before = dict(master.workers.pids)
            router.admit("b", range(20, 30), max_tokens=900, ignore_eos=True)
            await router.until(lambda: ("b", 1, 0) in router.streams)
            os.kill(before["i0/worker-1"], signal.SIGSTOP)
            assert (await router.ends("b", timeout_s=30.0)).code in ("worker_lost", "unavailable")
            await router.until(lambda: master.models[0].state == "ready", START_S)
            await checker.check("c")
            assert master.workers.pids["i0/worker-0"] == before["i0/worker-0"]

    asyncio.run(scenario())
