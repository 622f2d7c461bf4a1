"""A front end on a loop of its own thread, so that tests can speak to it with plain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import uvloop

from xllm.config.router import RouterSettings
from xllm.config.settings import Settings
from xllm.router.http.limits import limits_of
from xllm.router.http.server import HttpFront


def wait_until(condition, seconds=30.0):
    """Poll until `condition()` holds; fail after a deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.005)  # a poll, bounded by the deadline above
    raise AssertionError("the condition did not come true in time")


class FrontThread:
    """Runs an HttpFront over `service` until closed."""

    def __init__(self, service, *, limits=None, **router):
        self.service = service
        settings = Settings(router=RouterSettings(port=0, **router))
        self.limits = limits_of(settings.router) if limits is None else limits
        self._started = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(settings,), daemon=True)
        self._thread.start()
        assert self._started.wait(10)
        if self._error is not None:
            self._thread.join(10)
            raise self._error

    def _run(self, settings):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main(settings))

    async def _main(self, settings):
        self.loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        try:
            self.front = HttpFront(self.service, settings, limits=self.limits)
            self.url = await self.front.start()
        except Exception as error:
            self._error = error
            return
        finally:
            self._started.set()
        await self._closing.wait()
        await self.front.stop()

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    def call(self, function, *args):
        """Run a function on the front's loop and return what it returns."""

        async def run():
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def close(self):
        self.loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    # speaking to it

    def post(self, path, body, **kwargs):
        return httpx.post(self.url + path, json=body, timeout=10, trust_env=False, **kwargs)

    def get(self, path, **kwargs):
        return httpx.get(self.url + path, timeout=10, trust_env=False, **kwargs)

    @contextlib.contextmanager
    def socket(self, seconds=10):
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=seconds)
        with sock:
            yield sock

    def raw(self, data, seconds=10):
        """Send bytes, return all that comes until the other side closes."""
        with self.socket(seconds) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
            return read_all(sock)


def read_all(sock):
    """Bytes until the end of the connection."""
    pieces = []
    try:
        while piece := sock.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def raw_post(path, body, *, headers=()):
    """The bytes of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(data)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def sse_events(text):
    """The values of a stream's events; the last one is "[DONE]" where it ended well."""
    events = []
    for _, data in sse_blocks(text):
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def sse_blocks(text):
    """(id, data) of each event of a stream."""
    blocks = []
    for block in text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            assert name.startswith("id: ")
            assert data.startswith("data: ")
            blocks.append((name.removeprefix("id: "), data.removeprefix("data: ")))
    return blocks


def chat(content="hi", **fields):
    """A chat body."""
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **fields}
