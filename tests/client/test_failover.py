"""AsyncClient and several scripted routers: deaths, silence, stops; every token once, in order."""

from __future__ import annotations

import asyncio

import pytest

from tests.client.fake_router import FakeRouter
from tests.client.test_async_client import free_endpoint, until
from xllm import AsyncClient
from xllm.errors import BrokenError, DeadlineError, PermissionDeniedError, RequestAbortedError
from xllm.protocol.generation import LIFE_ATTEMPTS
from xllm.protocol.questions import RouterAddress


def with_routers(count, test, **options) -> None:
    """Run `test(client, routers)`; the client knows all of them."""

    async def main() -> None:
        routers = [FakeRouter() for _ in range(count)]
        endpoints = [router.endpoint for router in routers]
        try:
            async with AsyncClient(endpoints, **options) as client:
                await asyncio.wait_for(test(client, routers), 30)
                client.connection.check()
        finally:
            for router in routers:
                router.close()

    asyncio.run(main())


async def read_all(stream) -> str:
    return "".join([delta.text async for delta in stream])


def test_a_dead_router_costs_no_token():
    async def test(client, routers):
        stream = client.stream("part 2 a b c d")
        first = [(await stream.read()).text, (await stream.read()).text]
        routers[0].close()
        assert [*first, *[delta.text async for delta in stream]] == ["a", "b", "c", "d"]
        assert stream.completion.text == "abcd"
        assert stream.completion.token_ids == (0, 1, 2, 3)
        before, after = routers[0].submits[0], routers[1].submits[0]
        assert after.resume.outputs == ((0, 1),)
        assert after.resume.attempt == 1
        assert after.resume.seed == after.sampling.seed == before.sampling.seed
        assert after.key == before.key != ""
        assert after.timeout_ms <= before.timeout_ms
        assert client.connection.statistics().num_resumed == 1

    with_routers(2, test)


def test_a_whole_answer_is_asked_for_again_under_a_higher_attempt():
    async def test(client, routers):
        task = asyncio.create_task(client.generate("part 0 a b", n=2))
        await until(lambda: routers[0].submits)
        routers[0].close()
        assert (await task).text == "ab"
        again = routers[1].submits[0]
        assert (again.resume.attempt, again.resume.outputs) == (1, ((), ()))

    with_routers(2, test)


def test_a_second_loss_is_beyond_the_second_routers_attempts():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        routers[0].close()
        await until(lambda: routers[1].submits)
        routers[1].close()
        await until(lambda: routers[2].submits)
        # `half` gave the second router's client nothing: its attempts are unknown to it.
        assert routers[2].submits[0].resume.attempt == LIFE_ATTEMPTS
        stream.drop()

    with_routers(3, test)


def test_questions_are_asked_again():
    async def test(client, routers):
        routers[0].mute = True
        task = asyncio.create_task(client.models())
        await until(lambda: routers[0].peers)
        routers[0].close()
        assert [one.name for one in await task] == ["m"]

    with_routers(2, test)


def test_a_router_that_was_never_there_is_passed_by():
    async def main() -> None:
        router = FakeRouter()
        endpoints = [free_endpoint(), free_endpoint(), router.endpoint]
        async with AsyncClient(endpoints) as client:
            assert (client.endpoint, client.left) == (endpoints[0], ())
            assert (await client.generate("echo a")).text == "a"
            assert client.endpoint == router.endpoint
            found = "does not answer (nothing takes connections there)"
            assert client.left == tuple(f"{one} {found}" for one in endpoints[:2])
        router.close()

    asyncio.run(main())


def test_addresses_that_cannot_be_tried_are_passed_by():
    async def main() -> None:
        first, last = FakeRouter(), FakeRouter()
        bad = "tcp://10.1.2.3:8011"  # without a key of it
        named = [RouterAddress(one) for one in ("tcp://127.0.0.1:port", "http://127.0.0.1")]
        first.named = last.named = tuple(named)
        async with AsyncClient([bad, first.endpoint]) as client:
            assert (await client.generate("echo a")).text == "a"
            assert client.endpoint == first.endpoint
            assert [one.startswith(f"{bad} cannot be tried: ") for one in client.left] == [True]
        async with AsyncClient([bad, "tcp://10.1.2.4:8011"]) as client:
            with pytest.raises(BrokenError, match=r"10\.1\.2\.3:8011 is on another machine"):
                await client.generate("echo a")
        async with AsyncClient([first.endpoint, bad, last.endpoint], silence_s=0.2) as client:
            stream = client.stream("part 1 a b")
            await stream.read()
            first.mute = True
            assert await asyncio.wait_for(read_all(stream), 20) == "b"
            last.close()
            assert any(one.startswith(f"{bad} cannot be tried: ") for one in client.left)
            assert f"{first.endpoint} does not answer" in client.left
            first.mute = False
            assert (await asyncio.wait_for(client.generate("echo a"), 20)).text == "a"
            assert client.endpoint == first.endpoint
            assert not any(one.startswith(first.endpoint) for one in client.left)
        first.close()

    asyncio.run(main())


def test_a_router_that_does_not_know_our_key_is_passed_by():
    async def test(client, routers):
        stream = client.stream("part 1 a b")
        await stream.read()
        client.connection._refused()
        client.connection._refused()  # told twice before the next one is turned to
        assert await read_all(stream) == "b"
        assert routers[1].submits[0].resume.outputs == ((0,),)

    with_routers(2, test)


def test_when_no_router_knows_our_key_that_is_said():
    async def test(client, routers):
        stream = client.stream("half")
        await until(lambda: routers[0].num_pings)  # no connection is told of from here on
        client.connection._refused()
        await asyncio.sleep(0)  # it is turned to, and has not been heard of
        assert client.connection.endpoint == routers[1].endpoint
        client.connection._refused()
        with pytest.raises(PermissionDeniedError, match="does not know our key"):
            await read_all(stream)

    with_routers(2, test)


def test_a_router_that_says_nothing_is_left_though_its_socket_lives():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        routers[0].mute = True
        await until(lambda: routers[1].submits)
        assert routers[1].submits[0].resume.outputs == ((0,),)
        stream.drop()

    with_routers(2, test, silence_s=0.2)


def test_a_router_that_was_frozen_is_there_for_those_who_left_it():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        routers[0].mute = True
        await until(lambda: routers[1].submits)
        routers[0].mute = False
        routers[1].close()
        await until(lambda: len(routers[0].submits) == 2)
        assert routers[0].submits[1].resume.outputs == ((0,),)
        stream.drop()

    with_routers(2, test, silence_s=0.2)


def test_the_only_router_may_be_silent():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        routers[0].mute = True
        with pytest.raises(DeadlineError):
            await client.generate("echo a", timeout_s=1.0)
        routers[0].mute = False
        assert (await client.generate("echo a")).text == "a"
        stream.drop()
        assert len(routers[0].peers) == 1

    with_routers(1, test, silence_s=0.1)


def test_a_quiet_stream_is_kept_by_pings():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        await until(lambda: routers[0].num_pings >= 8)
        assert not routers[1].submits
        stream.drop()

    with_routers(2, test, silence_s=2.0)


def test_a_router_that_stops_is_left():
    async def test(client, routers):
        stream = client.stream("part 1 a b")
        await stream.read()
        routers[0].stop()
        assert await read_all(stream) == "b"
        assert routers[1].submits[0].resume.outputs == ((0,),)

    with_routers(2, test)


def test_what_a_stopping_router_refuses_is_asked_of_the_next():
    async def test(client, routers):
        streams = [client.stream("part 0 a b") for _ in range(200)]
        await until(lambda: len(routers[0].submits) == 200)
        routers[0].stop(refuses=True)
        assert await asyncio.gather(*map(read_all, streams)) == ["ab"] * 200

    with_routers(2, test)


def test_the_only_router_may_end_what_it_has_while_it_stops():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        routers[0].stop()
        assert (await client.generate("echo a")).text == "a"
        assert len(routers[0].peers) == 1
        stream.drop()

    with_routers(1, test)


def test_routers_are_learnt_from_the_one_that_was_reached():
    async def main() -> None:
        first, second = FakeRouter(), FakeRouter()
        first.named = (RouterAddress(second.endpoint),)
        async with AsyncClient(first.endpoint) as client:
            stream = client.stream("part 1 a b")
            await stream.read()
            await until(lambda: first.num_pings)
            await client.models()  # behind the pong
            first.close()
            assert await read_all(stream) == "b"
        async with AsyncClient(second.endpoint, discover=False, connect_timeout_s=0.3) as client:
            second.named = (RouterAddress(free_endpoint()),)
            stream = client.stream("half")
            await stream.read()
            second.close()
            with pytest.raises(BrokenError, match=second.endpoint):
                await read_all(stream)

    asyncio.run(main())


def test_the_same_router_may_come_back():
    async def main() -> None:
        router = FakeRouter()
        async with AsyncClient(router.endpoint) as client:
            stream = client.stream("part 1 a b")
            await stream.read()
            router.close()
            router = FakeRouter(router.endpoint)
            assert await read_all(stream) == "b"
        router.close()

    asyncio.run(main())


def test_when_all_are_gone_everything_ends_and_says_so():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        tasks = [asyncio.create_task(client.generate("silent")) for _ in range(5)]
        await until(lambda: len(routers[0].submits) == 6)
        for router in routers:
            router.close()
        for task in tasks:
            with pytest.raises(BrokenError, match=r"no router answers at .*, .*"):
                await task
        with pytest.raises(BrokenError):
            await stream.read()
        with pytest.raises(BrokenError):
            await client.generate("echo a")

    with_routers(2, test, connect_timeout_s=0.4)


def test_what_was_aborted_is_not_asked_for_again():
    async def test(client, routers):
        routers[0].mute = True
        stream = client.stream("half")
        await until(lambda: routers[0].peers)
        stream.abort()
        routers[0].close()
        with pytest.raises(RequestAbortedError):
            await stream.read()
        assert (await client.generate("echo a")).text == "a"
        assert len(routers[1].submits) == 1

    with_routers(2, test)


def test_many_streams_survive_a_death_at_once():
    async def test(client, routers):
        words = " ".join("abcdefgh")
        streams = [client.stream(f"part {k % 8} {words}") for k in range(300)]
        await until(lambda: len(routers[0].submits) == 300)
        routers[0].close()
        assert await asyncio.gather(*map(read_all, streams)) == ["abcdefgh"] * 300
        assert len(routers[1].submits) == 300

    with_routers(2, test)
