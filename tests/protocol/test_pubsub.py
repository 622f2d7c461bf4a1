"""Publishers and those who hear them."""

import asyncio

import pytest

from tests.protocol.socket_pairs import run, until
from xllm.errors import BrokenError, ConfigError
from xllm.protocol.bus import BusMessage, RouterPresence
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.protocol.transport.security import Security, create_keys


def test_publisher_to_subscribers(endpoint):
    async def main():
        transport = Transport()
        publisher = PublisherSocket(transport, endpoint)
        got = []
        subscriber = SubscriberSocket(
            transport, Decoder(BusMessage), lambda topic, message: got.append((topic, message.seq))
        )
        subscriber.connect(publisher.endpoint)
        number = 0
        async with asyncio.timeout(5):
            while not got:  # a late subscriber misses the first ones
                number += 1
                publisher.publish(b"presence", RouterPresence("r", "i", number))
                await asyncio.sleep(0.005)
        first = got[0][1]
        for number in range(number + 1, number + 100):
            publisher.publish(b"presence", RouterPresence("r", "i", number))
        await until(lambda: got[-1] == (b"presence", number))
        assert [seq for _, seq in got] == list(range(first, number + 1))
        subscriber.disconnect(publisher.endpoint)
        subscriber.disconnect("tcp://127.0.0.1:1")
        subscriber.close()
        publisher.close()
        transport.close()

    run(main())


def test_an_address_that_cannot_be_leaves_the_other_publishers_heard(tmp_path):
    async def main():
        transport = Transport()
        publisher = PublisherSocket(transport, f"ipc://{tmp_path}/p")
        late = PublisherSocket(transport, f"ipc://{tmp_path}/late")
        got = set()
        subscriber = SubscriberSocket(
            transport, Decoder(BusMessage), lambda topic, message: got.add(message.publisher)
        )
        subscriber.connect(publisher.endpoint)
        for bad in ("tcp://192.0.2.1:9", "http://x", "tcp://127.0.0.1:x"):
            with pytest.raises((BrokenError, ConfigError)):
                subscriber.connect(bad)
        with pytest.raises(BrokenError):
            subscriber.connect("tcp://192.0.2.1:9", "k" * 40)
        subscriber.connect(late.endpoint)
        async with asyncio.timeout(5):
            while got != {"p", "late"}:
                publisher.publish(b"presence", RouterPresence("p", "i", 1))
                late.publish(b"presence", RouterPresence("late", "i", 1))
                await asyncio.sleep(0.005)
        for thing in (subscriber, publisher, late, transport):
            thing.close()

    run(main())


def test_one_subscriber_hears_publishers_with_and_without_keys(tmp_path):
    async def main():
        key = create_keys(str(tmp_path / "k"))
        transport = Transport(Security.load(str(tmp_path / "k")))
        far = PublisherSocket(transport, "tcp://127.0.0.1:0")
        near = PublisherSocket(transport, f"ipc://{tmp_path}/p")
        got = set()
        subscriber = SubscriberSocket(
            transport, Decoder(BusMessage), lambda topic, message: got.add(message.publisher)
        )
        subscriber.connect(far.endpoint, key)
        subscriber.connect(near.endpoint)
        async with asyncio.timeout(5):
            while got != {"far", "near"}:
                far.publish(b"presence", RouterPresence("far", "i", 1))
                near.publish(b"presence", RouterPresence("near", "i", 1))
                await asyncio.sleep(0.005)
        for thing in (subscriber, near, far, transport):
            thing.close()

    run(main())
