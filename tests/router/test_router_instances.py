"""Instances of a router's process that die, fall silent, do not hear, leave: over real sockets."""

from __future__ import annotations

import msgspec

from tests.router.fake_instance import MODEL, drawn
from tests.router.router_bench import until
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.generation import RequestFinished
from xllm.protocol.records import DaemonRecord, InstanceRecord, daemon_key, instance_key
from xllm.router import hearing


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
