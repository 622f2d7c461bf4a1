"""The protocol without this library: pyzmq and msgpack only, as any language can speak it.

python examples/raw_zmq_msgpack.py [ENDPOINT]; docs/protocol.md has the fields.
"""

from __future__ import annotations

import sys

import msgpack
import zmq


def main() -> int:
    """Submit one request on a DEALER socket and read until its one terminal message."""
    endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:8011"
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, 60_000)
    socket.connect(endpoint)
    submit = {
        "type": "submit",
        "id": 1,
        "prompt": "xLLM is",
        "sampling": {"max_tokens": 32, "temperature": 0.0},
    }
    socket.send(msgpack.packb(submit))
    try:
        while True:
            message = msgpack.unpackb(socket.recv_multipart()[0])
            if message["type"] == "delta":
                print(message.get("text", ""), end="", flush=True)
            elif message["type"] == "finished":
                print(f"\n{message['usage']}")
                return 0
            else:
                print(f"\n{message}", file=sys.stderr)
                return 1
    finally:
        context.destroy()


if __name__ == "__main__":
    sys.exit(main())
