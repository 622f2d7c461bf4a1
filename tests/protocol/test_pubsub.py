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
            transport,
            publisher.endpoint,
            Decoder(BusMessage),
            lambda topic, message: got.append((topic, message.seq)),
        )
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
        subscriber.close()
        publisher.close()
        transport.close()

    run(main())


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("tcp://192.0.2.1:9", ""),
        ("http://x", ""),
        ("tcp://127.0.0.1:x", ""),
        ("tcp://192.0.2.1:9", "k" * 40),
    ],
)
def test_an_address_that_cannot_be_leaves_no_socket(address, key):
    async def main():
        transport = Transport()
        with pytest.raises((BrokenError, ConfigError)):
            SubscriberSocket(transport, address, Decoder(BusMessage), print, server_key=key)
        assert not transport._context._sockets
        transport.close()

    run(main())


@pytest.mark.parametrize("is_keyed", [True, False])
def test_a_process_with_keys_hears_publishers_with_and_without(tmp_path, is_keyed):
    async def main():
        key = create_keys(str(tmp_path / "k"))
        transport = Transport(Security.load(str(tmp_path / "k")))
        where = "tcp://127.0.0.1:0" if is_keyed else f"ipc://{tmp_path}/p"
        publisher = PublisherSocket(transport, where)
        got = []
        subscriber = SubscriberSocket(
            transport,
            publisher.endpoint,
            Decoder(BusMessage),
            lambda topic, message: got.append(message.publisher),
            server_key=key if is_keyed else "",
        )
        async with asyncio.timeout(5):
            while not got:
                publisher.publish(b"presence", RouterPresence("p", "i", 1))
                await asyncio.sleep(0.005)
        for thing in (subscriber, publisher, transport):
            thing.close()

    run(main())
