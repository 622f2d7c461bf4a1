"""Pairs of sockets in one loop, for tests of what goes between them."""

import asyncio

import uvloop

from xllm.protocol.client import BadMessage, ClientMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.router import RouterSocket

BOTH = Decoder(ClientMessage | RouterMessage)


def run(coroutine):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 20))


async def until(condition, timeout=5.0):
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.002)


def echo_pair(transport, endpoint, **options):
    """A router that echoes, and a dealer that collects."""
    got = []
    router = RouterSocket(
        transport,
        endpoint,
        BOTH,
        lambda identity, message, frames: router.send(identity, message, frames),
        bad_reply=lambda text: BadMessage(message=text),
        **options,
    )
    dealer = DealerSocket(
        transport, router.endpoint, BOTH, lambda message, frames: got.append((message, frames))
    )
    return router, dealer, got
