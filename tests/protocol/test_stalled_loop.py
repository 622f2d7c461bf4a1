"""A process whose loop stands still under a flood lives on, whatever becomes of its peer meanwhile.

In a process of its own each: libzmq would end this one."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMON = """
import asyncio
import sys
import threading

from xllm.protocol.bus import BusMessage, RouterPresence
from xllm.protocol.client import ClientMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import AbortRequest
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.limits import SocketLimits
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.protocol.transport.router import RouterSocket

FLOOD = 5000
BODY = bytes(500)
LITTLE = SocketLimits(high_water_mark=10)
WORDS = Decoder(ClientMessage)
transport, other = Transport(), Transport()
heard = []


async def until(condition, act=lambda: None):
    async with asyncio.timeout(20):
        while not condition():
            act()
            await asyncio.sleep(0.01)


def stand_still(seconds):
    threading.Event().wait(seconds)


def close(*those):
    for one in those:
        one.close()
"""

FLOODED_SUBSCRIBER = """
async def main():
    publisher = PublisherSocket(transport, "tcp://127.0.0.1:0")
    subscriber = SubscriberSocket(
        transport,
        publisher.endpoint,
        Decoder(BusMessage),
        lambda topic, word: heard.append(word.seq),
        limits=LITTLE,
    )

    def publish(seq):
        publisher.publish(b"router", RouterPresence("r", "1", seq, metrics=BODY))

    await until(lambda: heard, lambda: publish(0))
    for seq in range(1, 4 * FLOOD):
        publish(seq)
    stand_still(4.0)
    await until(lambda: 4 * FLOOD in heard, lambda: publish(4 * FLOOD))
    assert len(heard) < 4 * FLOOD, "nothing was lost: it was no flood"
    close(publisher, subscriber, transport, other)
"""

FLOODED_DEALER = """
async def main():
    peers = []
    router = RouterSocket(
        transport, "tcp://127.0.0.1:0", WORDS, lambda peer, word, frames: peers.append(peer)
    )
    dealer = DealerSocket(
        transport, router.endpoint, WORDS, lambda word, frames: heard.append(word.id), limits=LITTLE
    )
    dealer.send(AbortRequest(id=0))
    await until(lambda: peers)
    for seq in range(FLOOD):
        router.send(peers[0], AbortRequest(id=seq), (BODY,))
    stand_still(4.0)
    await until(lambda: len(heard) == FLOOD)
    assert heard == list(range(FLOOD))
    assert len(router.peers) == 1
    close(dealer, router, transport, other)
"""

# The connection of the side that stands still is reset, while its queue is full.
DEALER_LOSES_ITS_PEER = """
async def main():
    peers = []
    path = sys.argv[1]
    router = RouterSocket(other, path, WORDS, lambda peer, word, frames: peers.append(peer))
    gone = []
    dealer = DealerSocket(
        transport,
        path,
        WORDS,
        lambda word, frames: heard.append(word.id),
        on_gone=lambda: gone.append(True),
        limits=LITTLE,
    )
    dealer.send(AbortRequest(id=0))
    await until(lambda: peers)
    for seq in range(1000):
        router.send(peers[0], AbortRequest(id=seq), (BODY,))
    stand_still(0.5)
    close(router, other)
    stand_still(4.0)
    await until(lambda: gone)
    assert heard[:5] == list(range(5))
    again = Transport()
    router = RouterSocket(again, path, WORDS, lambda peer, word, frames: router.send(peer, word))
    dealer.send(AbortRequest(id=FLOOD))
    await until(lambda: FLOOD in heard)
    close(dealer, router, transport, again)
"""

ROUTER_LOSES_ITS_PEER = """
async def main():
    gone = []
    router = RouterSocket(
        transport,
        sys.argv[1],
        WORDS,
        lambda peer, word, frames: heard.append(word.id),
        on_gone=gone.append,
        limits=LITTLE,
    )
    dealer = DealerSocket(other, router.endpoint, WORDS, lambda word, frames: None)
    dealer.send(AbortRequest(id=0))
    await until(lambda: heard)
    for seq in range(1, 1000):
        dealer.send(AbortRequest(id=seq), (BODY,))
    stand_still(0.5)
    close(dealer, other)
    stand_still(4.0)
    await until(lambda: gone)
    assert heard[:5] == list(range(5))
    again = Transport()
    dealer = DealerSocket(again, router.endpoint, WORDS, lambda word, frames: None)
    dealer.send(AbortRequest(id=FLOOD))
    await until(lambda: FLOOD in heard)
    close(dealer, router, transport, again)
"""


SCRIPTS = {
    "a flooded subscriber": FLOODED_SUBSCRIBER,
    "a flooded dealer": FLOODED_DEALER,
    "a dealer that loses its peer": DEALER_LOSES_ITS_PEER,
    "a router that loses its peer": ROUTER_LOSES_ITS_PEER,
}


@pytest.mark.process
def test_a_loop_that_stands_still_does_not_abort(tmp_path):
    """All at the same time: they mostly stand still."""
    running = {}
    for number, (name, script) in enumerate(SCRIPTS.items()):
        code = f"{COMMON}{script}\n\nasyncio.run(main())\n"
        command = [sys.executable, "-c", code, f"ipc://{tmp_path}/{number}"]
        running[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    failed = {}
    try:
        for name, process in running.items():
            _, errors = process.communicate(timeout=100)
            if process.returncode:
                failed[name] = (process.returncode, errors[-2000:])
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert not failed
