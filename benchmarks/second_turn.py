"""A conversation of 220 KB that goes on: what its second turn waits for its first token."""

from __future__ import annotations

import http.client
import json
import random
import statistics
import time
import urllib.parse
from collections.abc import Callable

from benchmarks.texts import text

CHARS = 220_000


def second_turns(url: str, model: str, count: int, cpu_s: Callable[[], float]) -> dict[str, float]:
    """Medians over `count` conversations, one request at a time: first and second turn, each to
    its first token, in milliseconds; and what the routers' CPU (`cpu_s`) took for the second."""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80)
    first, second, cpu = [], [], []
    for _ in range(count):
        talk = [{"role": "user", "content": text(random.SystemRandom(), CHARS)}]
        first.append(time_to_first(connection, model, talk))
        talk += [
            {"role": "assistant", "content": "alpha beta"},
            {"role": "user", "content": "go on, and say more of the queue"},
        ]
        before = cpu_s()
        second.append(time_to_first(connection, model, talk))
        cpu.append(1e3 * (cpu_s() - before))
    connection.close()
    return {
        "first_turn_ms": round(statistics.median(first), 3),
        "second_turn_ms": round(statistics.median(second), 3),
        "second_turn_cpu_ms": round(statistics.median(cpu), 3),
    }


def time_to_first(
    connection: http.client.HTTPConnection, model: str, talk: list[dict[str, str]]
) -> float:
    """Milliseconds from the request to the first event."""
    body = json.dumps(
        {"model": model, "messages": talk, "max_tokens": 1, "temperature": 0, "stream": True}
    ).encode()
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.read1(64)
    took_s = time.perf_counter() - began
    answer.read()
    return 1e3 * took_s
