"""A server that speaks OpenAI's streams, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import json
import threading

import uvicorn


class FakeOpenAi:
    """Runs on a thread. `tokens(body)`: how many words it says. `fault(number)` is one of "",
    "503", "cut" (ends the connection in the stream), "unfinished" (ends without a last event),
    "error" (an error event), "empty", "hang", "garbage", for the request of that number."""

    def __init__(self, fault=lambda number: "", usage=True) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self._fault = fault
        self._usage = usage
        config = uvicorn.Config(
            self._app,
            port=0,
            interface="asgi3",
            log_level="critical",
            lifespan="off",
            timeout_keep_alive=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    @property
    def url(self) -> str:
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/v1"

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            threading.Event().wait(0.005)
        return self

    def __exit__(self, *exc):
        self._server.should_exit = True
        self._thread.join(10)

    async def _app(self, scope, receive, send):
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"] == "/v1/models":
            await self._whole(send, 200, {"data": [{"id": "fake-model"}]})
            return
        data = b""
        while True:
            message = await receive()
            data += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(data)
        self.bodies.append(body)
        self.headers.append(headers)
        fault = self._fault(len(self.bodies) - 1)
        if fault == "503":
            await self._whole(send, 503, {"error": {"message": "too busy, sorry"}})
            return
        await self._stream(receive, send, scope["path"], body, fault)

    async def _stream(self, receive, send, path, body, fault):
        await send({"type": "http.response.start", "status": 200, "headers": [_EVENTS]})
        chat = "chat" in path
        if chat:
            await self._event(send, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(0 if fault == "empty" else body["max_tokens"]):
            word = {"delta": {"content": "w"}} if chat else {"text": "w"}
            await self._event(send, {"choices": [{"index": 0, "finish_reason": None, **word}]})
            if number == 1 and fault == "cut":
                raise ConnectionAbortedError("as asked")
            if number == 1 and fault == "hang":
                await receive()  # until the client leaves
                return
            if number == 1 and fault == "error":
                await self._event(send, {"error": {"message": "no more"}})
                return
            if number == 1 and fault == "garbage":
                await send(_body(b"data: {no json\n\n"))
                return
        if fault != "unfinished":
            await self._event(send, {"choices": [{"text": "", "finish_reason": "length"}]})
            if self._usage:
                usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
                await self._event(send, {"choices": [], "usage": usage})
            await send(_body(b"data: [DONE]\n\n"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, send, event):
        await send(_body(b"data: " + json.dumps(event).encode() + b"\n\n"))
        await asyncio.sleep(0)

    async def _whole(self, send, status, content):
        await send({"type": "http.response.start", "status": status, "headers": [_JSON]})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})


_EVENTS = (b"content-type", b"text/event-stream")
_JSON = (b"content-type", b"application/json")


def _body(data):
    return {"type": "http.response.body", "body": data, "more_body": True}
