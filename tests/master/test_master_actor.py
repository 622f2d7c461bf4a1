"""The master's shell with a real worker's shell (toy engine) and a fake router, in one loop."""

import asyncio
import contextlib
import dataclasses

import pytest

from tests.master.fake_router import FakeRouter
from xllm.config.cluster import ClusterSettings
from xllm.config.master import MasterSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError
from xllm.master.actor import MasterActor
from xllm.protocol.bus import SnapshotOfBlocks
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import (
    AssignRole,
    CancelRequest,
    Drained,
    DrainInstance,
    EpochRefused,
    HeldTokens,
    InstancePong,
    PingInstance,
    ProbeAnswer,
    ProbeInstance,
    QuerySnapshot,
    QueryTokens,
)
from xllm.protocol.records import InstanceRecord, instance_key
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.open import open_registry
from xllm.protocol.transport.context import Transport
from xllm.worker.actor import WorkerActor
from xllm.worker.factory import make_executor
from xllm.worker.toy.stream import predict


def make_settings(run_dir, **worker) -> Settings:
    return Settings(
        cluster=ClusterSettings(run_dir=str(run_dir), heartbeat_s=0.02, shutdown_s=5.0),
        model=ModelSettings(name="toy"),
        master=MasterSettings(name="i0", spawn_workers=False),
        worker=WorkerSettings(
            engine="toy", block_size=4, toy_num_blocks=64, **{"toy_step_ms": 0.0, **worker}
        ),
    )


class Stage:
    """A master, a worker and a router."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.transport = Transport()
        self.closers = []

    async def start(self) -> None:
        self.master = MasterActor(self.settings, transport=self.transport)
        await self.master.open()
        self.router = self.make_router()
        await self.start_worker()

    def make_router(self) -> FakeRouter:
        router = FakeRouter(
            self.transport,
            self.master.models[0].conversation.endpoint,
            self.master.models[0].bus_endpoint,
        )
        self.closers.append(router.close)
        return router

    async def start_worker(self) -> None:
        own = dataclasses.replace(
            self.settings.master, worker_endpoint=self.master.workers.endpoint
        )
        settings = dataclasses.replace(self.settings, master=own)
        self.worker = WorkerActor(settings, make_executor, self.transport)
        await self.worker.open()
        await self.router.until(lambda: self.master.models[0].state == "ready")

    async def close(self) -> None:
        await self.master.close()
        await self.worker.close()
        for close in self.closers:
            close()
        self.transport.close()


@contextlib.asynccontextmanager
async def stage(run_dir, **worker):
    one = Stage(make_settings(run_dir, **worker))
    await one.start()
    try:
        yield one
    finally:
        await one.close()


def expected(request, choice=0):
    return predict(
        request.prompt_ids, request.sampling, choice, request.sampling.max_tokens, block_size=4
    )


def test_a_master_needs_something_to_spawn(run_dir):
    async def scenario():
        settings = dataclasses.replace(make_settings(run_dir), master=MasterSettings(name="i0"))
        with pytest.raises(ConfigError):
            MasterActor(settings)

    asyncio.run(scenario())


def test_requests_stream_to_their_routers(run_dir):
    async def scenario():
        async with stage(run_dir) as one:
            other = one.make_router()
            sent = []
            for index in range(40):
                router = (one.router, other)[index % 2]
                request = router.admit(f"r{index}", range(20, 25 + index), n=1 + index % 3)
                sent.append((router, request))
            for router, request in sent:
                ended = await router.ends(request.request_id)
                assert ended.code == ""
                for choice in range(request.sampling.n):
                    stream = router.streams[request.request_id, 1, choice]
                    assert stream.tokens == expected(request, choice)
                    assert stream.reason == "length"
            assert len(one.master.models[0].conversation.routes) == 0
            assert len(one.router.ended) == len(other.ended) == 20

    asyncio.run(scenario())


def test_heartbeats_count_and_tell_blocks_and_metrics(run_dir):
    async def scenario():
        async with stage(run_dir) as one:
            await one.router.until(lambda: one.router.beats)
            one.router.admit("a", range(20, 40), max_tokens=1)
            await one.router.ends("a")
            beats = one.router.beats
            await one.router.until(lambda: any(beat.events for beat in beats))
            stored = b"".join(e.stored for beat in beats for e in beat.events)
            assert len(stored) == 5 * 32
            one.router.send(QuerySnapshot())
            snapshot = await one.router.answer(SnapshotOfBlocks)
            assert snapshot.hashes == stored
            await one.router.until(lambda: beats[-1].seq >= snapshot.seq)
            seqs = [beat.seq for beat in beats]
            assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
            assert beats[-1].state == "ready"
            (worker,) = beats[-1].workers
            assert (worker.name, worker.state) == (f"{one.master.name}/worker-0", "ready")
            assert worker.device
            assert beats[-1].load.num_blocks == beats[-1].load.num_free_blocks == 64
            await one.router.until(lambda: any(b"xllm_master_ended" in b.metrics for b in beats))

    asyncio.run(scenario())


def test_cancel_is_silent_and_old_attempts_do_nothing(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            router = one.router
            first = router.admit("a", range(20, 30), max_tokens=100)
            await router.until(lambda: ("a", 1, 0) in router.streams)
            second = router.admit("a", range(20, 30), attempt=2, max_tokens=10)
            router.send(CancelRequest("a", 1))
            assert (await router.ends("a", 2)).code == ""
            assert router.streams["a", 2, 0].tokens == expected(second)
            assert ("a", 1) not in router.ended
            assert len(router.streams["a", 1, 0].tokens) < len(expected(first))
            router.admit("b", range(20, 30), max_tokens=100)
            await router.until(lambda: ("b", 1, 0) in router.streams)
            router.send(CancelRequest("b", 1))
            await router.until(lambda: one.master.models[0].steps.num_open == 0)
            router.admit("c", range(20, 30))
            await router.ends("c")
            assert ("b", 1) not in router.ended

    asyncio.run(scenario())


def test_refusals_and_deadlines_are_answered(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            one.router.admit("long", range(20, 20 + 300))
            assert (await one.router.ends("long")).code == "context_length_exceeded"
            one.router.admit("empty", ())
            assert (await one.router.ends("empty")).code == "invalid_value"
            one.router.admit("late", range(20, 30), max_tokens=200, timeout_ms=60)
            assert (await one.router.ends("late")).code == "deadline_exceeded"

    asyncio.run(scenario())


def test_probes_go_through_the_engine(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=1.0) as one:
            one.router.send(ProbeInstance(41))
            answer = await one.router.answer(ProbeAnswer)
            assert (answer.nonce, answer.ok) == (41, True)
            await one.worker.close()
            await one.router.until(lambda: one.master.models[0].state == "loading")
            one.router.answers.clear()
            one.router.send(ProbeInstance(42))
            answer = await one.router.answer(ProbeAnswer)
            assert (answer.nonce, answer.ok) == (42, False)

    asyncio.run(scenario())


def test_pings_are_answered_whatever_the_worker_does(run_dir):
    async def scenario():
        async with stage(run_dir) as one:
            await one.worker.close()
            await one.router.until(lambda: one.master.models[0].state == "loading")
            one.router.send(PingInstance(41))
            assert (await one.router.answer(InstancePong)).number == 41

    asyncio.run(scenario())


def test_a_router_may_ask_for_the_tokens_of_another(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            other, router = one.make_router(), one.router
            request = other.admit("a", range(20, 30), max_tokens=200, n=2)
            await router.until(lambda: len(other.streams) == 2)
            other.close()  # its requests run on for a while

            async def ask(number: int, name: str) -> tuple[tuple[int, ...], ...]:
                router.send(QueryTokens(number, name))
                answer = await router.answer(HeldTokens)
                router.answers.clear()
                assert answer.number == number
                return answer.outputs

            held = await ask(41, "a")
            assert [len(ids) > 0 for ids in held] == [True, True]
            assert held == tuple(
                tuple(expected(request, k)[: len(ids)]) for k, ids in enumerate(held)
            )
            assert await ask(42, "unknown") == ()
            await router.until(lambda: one.master.models[0].steps.num_open == 0)
            assert await ask(43, "a") == ()
            await one.worker.close()
            await router.until(lambda: one.master.models[0].state == "loading")
            assert await ask(44, "a") == ()

    asyncio.run(scenario())


def test_commands_of_older_epochs_are_refused(run_dir):
    async def scenario():
        async with stage(run_dir) as one:
            one.router.send(AssignRole("prefill", 7))
            await one.router.until(
                lambda: one.router.beats and one.router.beats[-1].role == "prefill"
            )
            one.router.send(AssignRole("decode", 6))
            refused = await one.router.answer(EpochRefused)
            assert (refused.epoch, refused.highest) == (6, 7)
            one.router.send(DrainInstance(100, epoch=3))
            await one.router.until(lambda: len(one.router.answers) == 2)
            assert one.master.models[0].state == "ready"
            assert one.router.beats[-1].role == "prefill"
            assert one.master.models[0].metrics.num_stale_commands == 2
            one.router.send(AssignRole("boss", 8))
            one.router.send(AssignRole("both", 8))
            await one.router.until(lambda: one.router.beats[-1].role == "both")

    asyncio.run(scenario())


def test_a_drain_finishes_what_runs_and_refuses_the_rest(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=2.0) as one:
            request = one.router.admit("a", range(20, 30), max_tokens=30)
            await one.router.until(lambda: one.router.streams)
            one.router.send(DrainInstance(5000))
            one.router.admit("b", range(20, 30))
            assert (await one.router.ends("b")).code == "unavailable"
            assert (await one.router.answer(Drained)).num_aborted == 0
            assert one.router.streams["a", 1, 0].tokens == expected(request)
            assert one.router.ended["a", 1].code == ""

    asyncio.run(scenario())


def test_a_drain_that_takes_too_long_ends_the_rest(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=10.0) as one:
            one.router.admit("a", range(20, 30), max_tokens=200)
            await one.router.until(lambda: one.router.streams)
            one.router.send(DrainInstance(50))
            assert (await one.router.answer(Drained)).num_aborted == 1
            assert one.router.ended["a", 1].code == "unavailable"

    asyncio.run(scenario())


def test_requests_of_a_lost_router_are_aborted_unless_they_came_again(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=20.0) as one:
            lost = one.make_router()
            lost.admit("a", range(20, 30), max_tokens=200)
            lost.admit("b", range(20, 30), max_tokens=200)
            await lost.until(lambda: len(lost.streams) == 2)
            lost.close()
            one.router.admit("b", range(20, 30), attempt=2, max_tokens=150)
            await one.router.until(lambda: one.master.models[0].steps.num_open == 1)
            await one.router.until(lambda: ("b", 2, 0) in one.router.streams)
            assert one.master.models[0].conversation.routes.attempt("b") == 2
            one.router.send(CancelRequest("b", 2))

    asyncio.run(scenario())


def test_a_lost_worker_ends_its_requests_and_another_serves_on(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            router = one.router
            router.admit("warm", range(20, 40), max_tokens=1)
            await router.ends("warm")
            await router.until(lambda: any(b.events for b in router.beats))
            router.admit("a", range(20, 30), max_tokens=100)
            await router.until(lambda: ("a", 1, 0) in router.streams)
            await one.worker.close()
            assert (await router.ends("a")).code in ("worker_lost", "unavailable")
            await router.until(lambda: router.beats[-1].state == "loading")
            cached = set()
            for beat in router.beats:
                for events in beat.events:
                    cached |= {events.stored[i : i + 32] for i in range(0, len(events.stored), 32)}
                    cached -= {
                        events.removed[i : i + 32] for i in range(0, len(events.removed), 32)
                    }
            assert not cached
            router.admit("b", range(20, 30))
            assert (await router.ends("b")).code == "unavailable"
            await one.start_worker()
            request = router.admit("c", range(20, 30))
            assert (await router.ends("c")).code == ""
            assert router.streams["c", 1, 0].tokens == expected(request)

    asyncio.run(scenario())


def test_a_frozen_worker_that_is_not_ours_is_asked_to_stop(run_dir):
    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            one.router.admit("warm", range(20, 30))
            await one.router.ends("warm")
            one.master.workers.links[0].vigil.verdict = lambda now, denied_s: "a step has not moved"
            one.router.admit("a", range(20, 30), max_tokens=200)
            assert (await one.router.ends("a")).code in ("worker_lost", "unavailable")
            await one.router.until(lambda: one.worker.stopping)

    asyncio.run(scenario())


def test_an_instance_registers_when_it_is_ready_and_withdraws(run_dir):
    async def scenario():
        settings = make_settings(run_dir)
        cluster = dataclasses.replace(settings.cluster, registry=f"ipc://{run_dir}/registry")
        one = Stage(dataclasses.replace(settings, cluster=cluster))
        server = EmbeddedRegistryServer(one.transport, f"ipc://{run_dir}/registry")
        registry = open_registry(cluster.registry, one.transport)
        key = instance_key("default", "i0")
        await one.start()
        async with asyncio.timeout(10):
            while (entry := await registry.get(key)) is None:
                await asyncio.sleep(0.005)
        record = Decoder[InstanceRecord](InstanceRecord).decode(entry.value)
        assert record.endpoint == one.master.models[0].conversation.endpoint
        assert (record.model, record.block_size, record.num_blocks) == ("toy", 4, 64)
        assert record.incarnation == one.master.incarnation
        await one.router.until(lambda: one.router.beats)
        await one.master.close()
        await one.router.until(lambda: one.router.beats[-1].state == "draining")
        assert await registry.get(key) is None
        await one.worker.close()
        one.router.close()
        await registry.close()
        await server.close()
        one.transport.close()

    asyncio.run(scenario())
