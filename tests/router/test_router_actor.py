"""The router's process in one loop with fake instances, over real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from tests.router.fake_instance import MODEL, drawn
from tests.router.router_bench import Bench, until
from xllm.config.router import RouterSettings
from xllm.config.settings import Settings
from xllm.errors import ConfigError, DependencyError
from xllm.protocol.bus import RouterPresence
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.generation import AbortRequest, RequestFinished, TokenDelta
from xllm.protocol.instance import DrainInstance
from xllm.protocol.questions import (
    DetokenizeIds,
    HealthReport,
    ListModels,
    QueryHealth,
    QueryStatus,
    StatusReport,
    TokenizedText,
    TokenizeText,
)
from xllm.protocol.records import RouterRecord, router_key
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.router.actor import RouterActor


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


def test_it_registers_and_shows_itself(in_bench):
    async def body(b):
        heard: list[RouterPresence] = []
        entry = await b.registry.get(router_key("default", "r"))
        record = Decoder(RouterRecord).decode(entry.value)
        assert record.zmq_endpoint == b.router.zmq.endpoint
        assert record.http_address == b.router.http_address
        bus = SubscriberSocket(
            b.transport,
            record.bus_endpoint,
            Decoder(RouterPresence),
            lambda topic, word: heard.append(word),
        )
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
