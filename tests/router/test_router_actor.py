"""The router's process in one loop with fake instances, over real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import asynccontextmanager

import msgspec
import pytest

from tests.router.fake_instance import HEARTBEAT_S, MODEL, FakeInstance, drawn
from tests.router.model_dirs import byte_level_tokenizer, write_model
from xllm.config.settings import ClusterSettings, ModelSettings, RouterSettings, Settings
from xllm.errors import ConfigError, DependencyError
from xllm.protocol.bus import RouterPresence
from xllm.protocol.client import (
    AbortRequest,
    BadMessage,
    DetokenizeIds,
    HealthReport,
    ListModels,
    QueryHealth,
    QueryStatus,
    RequestFailed,
    RequestFinished,
    RouterMessage,
    StatusReport,
    SubmitRequest,
    TokenDelta,
    TokenizedText,
    TokenizeText,
)
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import DrainInstance
from xllm.protocol.records import (
    DaemonRecord,
    InstanceRecord,
    RouterRecord,
    daemon_key,
    instance_key,
    router_key,
)
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.router import hearing
from xllm.router.actor import RouterActor

MODEL_TOKENIZER = byte_level_tokenizer()


class RawClient:
    """Speaks the client's conversation and keeps all answers by number."""

    def __init__(self, transport, endpoint) -> None:
        self.heard: dict[int, list] = {}
        self.bad: list[BadMessage] = []
        self.socket = DealerSocket(transport, endpoint, Decoder(RouterMessage), self._on_message)

    def _on_message(self, message, frames) -> None:
        if isinstance(message, BadMessage):
            self.bad.append(message)
        else:
            self.heard.setdefault(message.id, []).append(message)

    def submit(self, number, max_tokens=8, prompt="hello", **more) -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        self.socket.send(SubmitRequest(id=number, prompt=prompt, sampling=sampling, **more))

    async def last(self, number, kind=(RequestFinished, RequestFailed)):
        await until(lambda: any(isinstance(m, kind) for m in self.heard.get(number, ())))
        return next(m for m in self.heard[number] if isinstance(m, kind))

    def ids(self, number) -> list[int]:
        found = []
        for one in self.heard.get(number, ()):
            if isinstance(one, TokenDelta):
                assert one.first_index == len(found)
                found += one.token_ids
        return found


async def until(condition, timeout_s=10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


class Bench:
    """A registry, instances, one router and clients in one loop."""

    def __init__(self, run_dir, tmp_path, **router) -> None:
        self.run_dir = run_dir
        self.transport = Transport()
        self.server = EmbeddedRegistryServer(self.transport, f"ipc://{run_dir}/registry")
        self.registry = self.server.registry
        model = write_model(tmp_path / "model", MODEL_TOKENIZER)
        self.settings = Settings(
            cluster=ClusterSettings(
                registry=self.server.endpoint,
                run_dir=str(run_dir),
                heartbeat_s=HEARTBEAT_S * 2,
                shutdown_s=0.3,
            ),
            model=ModelSettings(path=str(model), name=MODEL),
            router=RouterSettings(name="r", port=0, zmq_port=0, **router),
        )
        self.router = RouterActor(self.settings)
        self.instances: list[FakeInstance] = []
        self.clients: list[RawClient] = []
        self.closed = False

    async def instance(self, name, **more) -> FakeInstance:
        one = FakeInstance(self.transport, self.registry, self.run_dir, name, **more)
        self.instances.append(one)
        await one.register()
        view = self.router.service.view
        await until(lambda: any(seen.name == name for seen in view.usable(MODEL)))
        return one

    def client(self) -> RawClient:
        one = RawClient(self.transport, self.router.zmq.endpoint)
        self.clients.append(one)
        return one

    async def stop(self) -> None:
        if not self.closed:
            self.closed = True
            await self.router.close()


@asynccontextmanager
async def bench(run_dir, tmp_path, **router):
    made = Bench(run_dir, tmp_path, **router)
    try:
        await made.router.open()
        yield made
        made.router.service.dispatcher.check()
        made.router.service.view.check()
    finally:
        await made.stop()
        for one in made.clients:
            one.socket.close()
        for one in made.instances:
            one.close()
        await made.server.close()
        made.transport.close()


@pytest.fixture
def in_bench(run_dir, tmp_path):
    """Runs a coroutine function over a fresh bench."""

    def run(test, **router):
        async def body():
            async with bench(run_dir, tmp_path, **router) as made:
                await test(made)

        asyncio.run(asyncio.wait_for(body(), 30))

    return run


def test_a_request_goes_through_all_sockets(in_bench):
    async def body(b):
        instance = await b.instance("a")
        client = b.client()
        client.submit(1, 8)
        last = await client.last(1)
        assert isinstance(last, RequestFinished)
        assert client.ids(1) == [drawn(k) for k in range(8)]
        assert last.request_id == instance.admits[0].request_id
        client.submit(2, 4, stream=False)
        last = await client.last(2)
        assert last.choices[0].token_ids == tuple(drawn(k) for k in range(4))
        assert not instance.cancels

    in_bench(body)


def test_questions_are_answered(in_bench):
    async def body(b):
        await b.instance("a")
        client = b.client()
        for number, question in enumerate(
            (
                ListModels(id=0),
                QueryHealth(id=1, probe=True),
                QueryStatus(id=2),
                TokenizeText(id=3, text="hello"),
                TokenizeText(id=4),
                DetokenizeIds(id=5, token_ids=(5, 6)),
            )
        ):
            client.socket.send(question)
            await until(lambda number=number: number in client.heard)
        assert client.heard[0][0].models[0].name == MODEL
        assert isinstance(client.heard[1][0], HealthReport)
        assert client.heard[1][0].ready
        assert isinstance(client.heard[2][0], StatusReport)
        assert isinstance(client.heard[3][0], TokenizedText)
        assert client.heard[4][0].code == "invalid_value"
        assert client.heard[5][0].text

    in_bench(body)


def test_a_client_that_leaves_aborts_its_requests_at_once(in_bench):
    async def body(b):
        instance = await b.instance("a", tokens_at_once=1)
        client, other = b.client(), b.client()
        for number in range(3):
            client.submit(number, 50)
        other.submit(1, 50)
        await until(lambda: len(instance.admits) == 4 and other.ids(1))
        client.socket.close()
        left = time.monotonic()
        await until(lambda: len(instance.cancels) == 3)
        assert time.monotonic() - left < 0.5
        assert b.router.service.num_open == 1
        instance.finish(instance.admits[-1])
        for request in instance.admits:
            instance.finish(request)
        assert isinstance(await other.last(1), RequestFinished)

    in_bench(body)


def test_nonsense_is_answered_and_harms_nobody(in_bench):
    async def body(b):
        await b.instance("a")
        client = b.client()
        client.socket.send(DrainInstance(1))  # no word of this conversation
        await until(lambda: client.bad)
        client.submit(1, 3)
        assert isinstance(await client.last(1), RequestFinished)
        client.submit(2, 3, prompt="")
        last = await client.last(2)
        assert (last.code, last.param) == ("invalid_value", "prompt")

    in_bench(body)


def test_a_number_in_use_is_a_conflict(in_bench):
    async def body(b):
        instance = await b.instance("a", tokens_at_once=1)
        client = b.client()
        client.submit(1, 5)
        await until(lambda: client.ids(1))
        client.submit(1, 5)
        await until(lambda: client.bad)
        assert "request 1 " in client.bad[0].message
        instance.finish(instance.admits[0])
        await client.last(1, RequestFinished)
        ends = [one for one in client.heard[1] if not isinstance(one, TokenDelta)]
        assert len(ends) == 1
        assert len(instance.admits) == 1
        client.submit(1, 5)
        await until(lambda: len(instance.admits) == 2)
        client.socket.send(AbortRequest(id=1))
        await until(lambda: len(instance.cancels) == 1)

    in_bench(body)


def test_the_death_of_an_instance_costs_no_token(in_bench):
    async def body(b):
        first = await b.instance("a", tokens_at_once=3)
        client = b.client()
        for number in range(4):
            client.submit(number, 10)
        await until(lambda: all(client.ids(number) for number in range(4)))
        second = await b.instance("b")
        first.close()
        for number in range(4):
            assert isinstance(await client.last(number), RequestFinished)
            assert client.ids(number) == [drawn(k) for k in range(10)]
        assert len(first.admits) == 4
        assert all((one.attempt, len(one.outputs[0])) == (2, 3) for one in second.admits)

    in_bench(body)


def test_a_silent_instance_is_suspect(in_bench):
    async def body(b):
        first = await b.instance("a", tokens_at_once=1)
        client = b.client()
        client.submit(1, 5)
        await until(lambda: client.ids(1))
        second = await b.instance("b")
        first._beating.cancel()
        assert isinstance(await client.last(1), RequestFinished)
        assert second.admits[0].attempt == 2
        assert first.cancels[0].attempt == 1

    in_bench(body)


def test_an_instance_that_does_not_hear_gets_nothing_until_it_does(in_bench):
    async def body(b):
        first = await b.instance("a", tokens_at_once=1)
        await until(lambda: first.num_pings >= 2)
        client = b.client()
        client.submit(1, 5)
        await until(lambda: client.ids(1))
        second = await b.instance("b")
        first.is_deaf = True
        assert isinstance(await client.last(1), RequestFinished)
        assert second.admits[0].attempt == 2
        view = b.router.service.view
        assert not view.get("a").silent
        assert [one.name for one in view.usable(MODEL)] == ["b"]
        first.is_deaf = False
        await until(lambda: len(view.usable(MODEL)) == 2)

    in_bench(body)


def test_a_connection_that_carries_nothing_is_made_anew(in_bench, monkeypatch):
    monkeypatch.setattr(hearing, "RECONNECT_S", 0.8)

    async def body(b):
        one = await b.instance("a", tokens_at_once=1)
        await until(lambda: one.num_pings >= 2)
        client = b.client()
        client.submit(1, 5)
        await until(lambda: client.ids(1))
        one.tokens_at_once = None
        one.deaf_to = one.peers
        # The router asks for the rest over another connection: the first one never heard of it.
        assert isinstance(await client.last(1), RequestFinished)
        assert [request.attempt for request in one.admits] == [1, 2]
        assert client.ids(1) == [drawn(k) for k in range(5)]

    in_bench(body)


def test_an_instance_of_a_version_without_pings_is_used(in_bench):
    async def body(b):
        first = await b.instance("a")
        second = await b.instance("b", answers_pings=False)
        # Long enough for an unanswered question to be too old.
        await until(lambda: first.num_pings >= 20)
        assert second.num_pings == 1
        assert [one.name for one in b.router.service.view.usable(MODEL)] == ["a", "b"]

    in_bench(body)


def test_a_draining_instance_finishes_what_it_has(in_bench):
    async def body(b):
        first = await b.instance("a", tokens_at_once=1)
        client = b.client()
        client.submit(1, 5)
        await until(lambda: client.ids(1))
        second = await b.instance("b")
        first.state = "draining"
        await first.deregister()
        await until(lambda: len(b.router.service.view.usable(MODEL)) == 1)
        client.submit(2, 5)
        await client.last(2)
        assert len(second.admits) == 1
        first.finish(first.admits[0])
        assert isinstance(await client.last(1), RequestFinished)
        assert len(second.admits) == 1
        first.close()
        await until(lambda: b.router.service.view.get("a") is None)

    in_bench(body)


def test_a_record_that_names_another_is_none(in_bench):
    async def body(b):
        await b.instance("a")
        entry = await b.registry.get(instance_key("default", "a"))
        record = Decoder(InstanceRecord).decode(entry.value)
        forged = msgspec.structs.replace(record, incarnation="other")
        await b.registry.put(instance_key("default", "c"), encode(forged))
        await b.instance("b")  # its record comes behind that one
        await until(lambda: b.router.service.view.get("b") is not None)
        one = b.router.service.view.get("a")
        assert one.record.incarnation == record.incarnation
        assert one.usable

    in_bench(body)


def test_stopping_drains_and_tells_the_rest(in_bench):
    async def body(b):
        instance = await b.instance("a", tokens_at_once=1)
        client = b.client()
        client.submit(1, 5)
        client.submit(2, 5)
        await until(lambda: client.ids(1) and client.ids(2))
        stop = asyncio.ensure_future(b.stop())
        await until(lambda: b.router.service.draining)
        client.submit(3, 5)
        assert (await client.last(3)).code == "unavailable"
        instance.finish(next(one for one in instance.admits if one.sampling.max_tokens == 5))
        await stop
        codes = {type(await client.last(n)).__name__ for n in (1, 2)}
        assert codes == {"RequestFinished", "RequestFailed"}

    in_bench(body)


def test_stopping_refuses_at_once_and_ends_in_time_without_a_registry(in_bench):
    async def body(b):
        await b.instance("a", tokens_at_once=1)
        client = b.client()
        client.submit(1, 5)
        await until(lambda: client.ids(1))

        async def hang():
            await asyncio.Event().wait()

        b.router._registration.withdraw, withdraw = hang, b.router._registration.withdraw
        began = time.monotonic()
        stop = asyncio.ensure_future(b.stop())
        await asyncio.sleep(0)
        assert b.router.service.draining
        await stop
        assert time.monotonic() - began < b.settings.cluster.shutdown_s + 1
        assert (await client.last(1)).code == "aborted"
        await withdraw()

    in_bench(body)


def test_a_record_that_cannot_be_used_leaves_the_router_hearing_others(in_bench):
    async def body(b):
        client = b.client()
        for name, endpoint, bus in (
            ("far", "tcp://192.0.2.1:9", "tcp://192.0.2.1:9"),
            ("odd", "http://x", "http://x"),
            ("half", f"ipc://{b.run_dir}/half", "http://x"),
        ):
            record = InstanceRecord(
                name=name,
                incarnation="1",
                endpoint=endpoint,
                bus_endpoint=bus,
                model=MODEL,
                model_path="",
                max_model_len=256,
                vocab_size=330,
                block_size=4,
                num_blocks=64,
            )
            daemon = DaemonRecord(name=name, incarnation="1", endpoint="", bus_endpoint=bus)
            await b.registry.put(instance_key("default", name), encode(record))
            await b.registry.put(daemon_key("default", name), encode(daemon))
        await b.instance("a")
        client.submit(1, 5)
        assert isinstance(await client.last(1), RequestFinished)
        for name in ("far", "odd", "half"):
            await b.registry.delete(instance_key("default", name))
            await b.registry.delete(daemon_key("default", name))
        await until(lambda: b.router.service.view.get("half") is None)
        client.submit(2, 5)
        assert isinstance(await client.last(2), RequestFinished)
        assert b.router.transport.num_handler_errors == 0

    in_bench(body)


def test_it_registers_and_shows_itself(in_bench):
    async def body(b):
        heard: list[RouterPresence] = []
        entry = await b.registry.get(router_key("default", "r"))
        record = Decoder(RouterRecord).decode(entry.value)
        assert record.zmq_endpoint == b.router.zmq.endpoint
        assert record.http_address == b.router.http_address
        bus = SubscriberSocket(
            b.transport, Decoder(RouterPresence), lambda topic, word: heard.append(word)
        )
        bus.connect(record.bus_endpoint)
        await b.instance("a")
        await until(lambda: heard and dict(heard[-1].inflight) == {"a": 0})
        other = PublisherSocket(b.transport, f"ipc://{b.run_dir}/other-bus")
        shown = RouterRecord(
            name="other", incarnation="1", zmq_endpoint="", bus_endpoint=other.endpoint
        )
        await b.registry.put(router_key("default", "other"), encode(shown))
        async with asyncio.timeout(10):
            while "other" not in b.router.service.view.routers:
                other.publish(b"router", RouterPresence("other", "1", 1))
                await asyncio.sleep(0.005)
        assert set(b.router.service.view.routers) == {"other"}
        await b.registry.delete(router_key("default", "other"))
        await until(lambda: not b.router.service.view.routers)
        other.close()
        bus.close()
        await b.stop()
        assert await b.registry.get(router_key("default", "r")) is None

    in_bench(body)


def test_the_http_front_is_open(in_bench):
    async def body(b):
        await b.instance("a")
        host, port = b.router.http_address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"m"' in answer

    in_bench(body)


@pytest.mark.parametrize(
    "router", [RouterSettings(host="10.0.0.1"), RouterSettings(zmq_host="10.0.0.1")]
)
def test_other_machines_need_keys(router):
    async def make():
        RouterActor(Settings(router=router))

    with pytest.raises(ConfigError) as caught:
        asyncio.run(make())
    assert caught.value.exit_code == 64


def test_a_model_without_tokenizer_is_a_missing_dependency(run_dir, tmp_path):
    async def start():
        made = Bench(run_dir, tmp_path)
        model = dataclasses.replace(made.settings.model, path=str(tmp_path))
        made.router = RouterActor(dataclasses.replace(made.settings, model=model))
        try:
            await made.router.open()
        finally:
            await made.stop()
            await made.server.close()
            made.transport.close()

    with pytest.raises(DependencyError, match=r"tokenizer\.json"):
        asyncio.run(asyncio.wait_for(start(), 30))
