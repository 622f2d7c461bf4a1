"""What is said between sockets in tests of keys, and a router that notes what it hears."""

from __future__ import annotations

from xllm.protocol.client import ClientMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import InstanceReply, InstanceRequest
from xllm.protocol.transport.router import RouterSocket

BOTH = Decoder(ClientMessage | RouterMessage)
ASKS: Decoder = Decoder(InstanceRequest)
ANSWERS: Decoder = Decoder(InstanceReply)
ANYWHERE = "tcp://127.0.0.1:0"


def hearing(nodes, transport, **more):
    """A router of instance requests that notes (peer's name, message), and who left."""
    heard, gone = [], []
    router = nodes.keep(
        RouterSocket(
            transport,
            ANYWHERE,
            ASKS,
            lambda identity, message, frames: heard.append((router.peer(identity).name, message)),
            on_gone=gone.append,
            **more,
        )
    )
    return router, heard, gone
