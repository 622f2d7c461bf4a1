"""HTTP without a client library: connections that ask, and need not read."""

from __future__ import annotations

import json
import socket

from xllm.cli.chaos.stage import Stage


def ask_http(stage: Stage, index: int, num_tokens: int) -> socket.socket:
    """A connection over which a stream was asked for, and that is not read."""
    body = json.dumps({
        "model": stage.load.model, "prompt": [20 + index % 200, 30, 40], "stream": True,
        "max_tokens": num_tokens, "ignore_eos": True,
    }).encode()  # fmt: skip
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", stage.http_port))
    one.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return one
