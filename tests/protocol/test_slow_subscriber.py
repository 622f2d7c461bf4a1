"""A subscriber that stands still under a flood lives on: it misses words and hears later ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import asyncio
import threading

from xllm.protocol.bus import BusMessage, RouterPresence
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket

FLOOD = 20_000


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def main():
    transport = Transport()
    heard = []
    publisher = PublisherSocket(transport, "tcp://127.0.0.1:0")
    subscriber = SubscriberSocket(
        transport, Decoder(BusMessage), lambda topic, word: heard.append(word.seq)
    )
    subscriber.connect(publisher.endpoint)

    def publish(seq):
        publisher.publish(b"router", RouterPresence("r", "1", seq, metrics=bytes(500)))

    async def first():
        publish(0)
        await asyncio.sleep(0.02)

    async with asyncio.timeout(20):
        while not heard:
            await first()
    for seq in range(1, FLOOD):
        publish(seq)
    # The loop stands still for longer than a heartbeat of the transport may be late.
    threading.Event().wait(4.0)
    async with asyncio.timeout(20):
        while FLOOD not in heard:
            publish(FLOOD)
            await asyncio.sleep(0.02)
    assert len(heard) < FLOOD, "nothing was lost: it was no flood"
    publisher.close()
    subscriber.close()
    transport.close()


asyncio.run(main())
"""


@pytest.mark.process
def test_a_loop_that_stands_still_under_a_flood_does_not_abort():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
