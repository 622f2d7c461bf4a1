"""A bare asyncio HTTP answerer: what this machine and a load generator can do at best.

    python -m benchmarks.mock_backend --port 9001

It parses a request's head and length, decodes the JSON, and answers `max_tokens` canned tokens
as one body or as SSE, one write a token. No routing, no tokenizing, no scheduling: the yardstick
that the service's figures are scaled by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import uvloop

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = chunk(
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"mock","choices":'
    b'[{"index":0,"delta":{"content":" tok"},"finish_reason":null}]}\n\n'
)


def usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 8, "completion_tokens": count, "total_tokens": 8 + count}


class Answerer(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = 0
            for line in self.buffer[:end].split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(json.loads(body) if body else {})

    def answer(self, request: dict[str, object]) -> None:
        count = int(str(request.get("max_tokens") or 1))
        if request.get("stream"):
            asyncio.get_running_loop().create_task(self.stream(count))
            return
        message = {"role": "assistant", "content": " tok" * count}
        data = json.dumps(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 1,
                "model": "mock",
                "usage": usage(count),
                "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
            }
        ).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        self.transport.write(head.encode() + b"\r\n\r\n" + data)

    async def stream(self, count: int) -> None:
        self.transport.write(STREAM_HEAD)
        for _ in range(count):
            await asyncio.sleep(0)
            if self.transport.is_closing():
                return
            self.transport.write(TOKEN)
        last = json.dumps({"choices": [], "usage": usage(count)}).encode()
        end = chunk(b"data: " + last + b"\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        self.transport.write(end)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answerer, "127.0.0.1", port, backlog=1024)
    print("READY", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))
