"""Whether a tenant can tell from the time of an answer what another tenant asked.

    python -m benchmarks.tenant_timing [--rounds 200] [--words 500] [--json] [-- SERVE FLAGS]

A service with two API keys and the demo model on this machine. In each round of an arm the spy
times its first token of a text that was never there before; just before that a request of the same
length is made, which is the arm:

    asked     the other tenant asked that very text
    unasked   the other tenant asked another text
    own       the spy itself asked that very text: what a hit looks like, so that it would be seen

Arms take turns in an order drawn by lot. `chance`: that a spy who is given one time of `asked` and
one of `unasked` (or of `own` and `unasked`) says rightly which is which, with its 95% interval, and
`p` of a permutation test (see two_samples). Exit code 1 where p < 0.01 for `asked`, where
`cached_tokens` tell anything, or where `own` is not told apart in 9 of 10 cases: then times here
say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.service import free_port, wait_http
from benchmarks.two_samples import compare

ARMS = ("asked", "unasked", "own")
VICTIM, SPY = "victim-0123456789abcdef", "spy-0123456789abcdef"
SEEN = 0.9
"""A hit of one's own must be told apart so often, or the times are too rough to say anything."""


class Tenant:
    """One API key and its connection."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def ask(self, text: str) -> tuple[float, int]:
        """Milliseconds to the first token, and how many tokens were found cached."""
        options = {"max_tokens": 1, "temperature": 0, "stream": True, "ignore_eos": True}
        options["stream_options"] = {"include_usage": True}
        body = json.dumps({"model": "demo", "prompt": text, **options}).encode()
        began = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, self._headers)
        answer = self._connection.getresponse()
        first = answer.read1(64)
        took_s = time.perf_counter() - began
        rest = first + answer.read()
        if answer.status != 200:
            raise SystemExit(f"HTTP {answer.status}: {rest[:300]!r}")
        events = [line[6:] for line in rest.splitlines() if line.startswith(b"data: {")]
        details = json.loads(events[-1])["usage"].get("prompt_tokens_details") or {}
        return 1e3 * took_s, int(details.get("cached_tokens", 0))


@dataclasses.dataclass
class Arm:
    """What the spy saw."""

    times_ms: list[float] = dataclasses.field(default_factory=list)
    cached: list[int] = dataclasses.field(default_factory=list)


def measure(victim: Tenant, spy: Tenant, rounds: int, words: int) -> dict[str, Arm]:
    """All arms, in an order drawn by lot."""
    lot = random.Random(11)
    vocabulary = [f"{a}{b}" for a in ("al", "be", "ca", "do") for b in ("ter", "ring", "pha", "s")]

    def text() -> str:
        return " ".join(lot.choices(vocabulary, k=words))

    arms = {name: Arm() for name in ARMS}
    order = [name for name in ARMS for _ in range(rounds)]
    lot.shuffle(order)
    for _ in range(5):
        victim.ask(text())
        spy.ask(text())
    for name in order:
        wanted, other = text(), text()
        (spy if name == "own" else victim).ask(other if name == "unasked" else wanted)
        took_ms, cached = spy.ask(wanted)
        arms[name].times_ms.append(took_ms)
        arms[name].cached.append(cached)
    return arms


def summary(arms: dict[str, Arm]) -> dict[str, Any]:
    """The figures, and `holds`: whether nothing was to be seen by somebody who could see."""
    asked = compare(arms["asked"].times_ms, arms["unasked"].times_ms)
    own = compare(arms["own"].times_ms, arms["unasked"].times_ms)
    leaked = max(arms["asked"].cached + arms["unasked"].cached)
    return {
        "rounds": len(arms["asked"].times_ms),
        "median_ms": {n: round(statistics.median(one.times_ms), 2) for n, one in arms.items()},
        "cached_tokens": {name: max(one.cached) for name, one in arms.items()},
        "asked": dataclasses.asdict(asked),
        "own": dataclasses.asdict(own),
        "holds": not asked.is_apart() and own.chance >= SEEN and leaked == 0,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="of each arm")
    parser.add_argument("--words", type=int, default=500, help="of a text")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("flags", nargs="*", help="flags of xllm serve, after --")
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        keys = pathlib.Path(folder, "api-keys")
        keys.touch(0o600)
        keys.write_text(f"victim:{VICTIM}\nspy:{SPY}\n")
        command = [sys.executable, "-m", "xllm", "serve", "--port", str(port), "--zmq-port", "0"]
        command += ["--model-name", "demo", "--api-key-file", str(keys), *options.flags]
        with open(os.path.join(folder, "log"), "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                wait_http(f"http://127.0.0.1:{port}/health/live", process)
                wait_served(port)
                arms = measure(
                    Tenant(port, VICTIM), Tenant(port, SPY), options.rounds, options.words
                )
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(30)
    figures = summary(arms)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:14} {value}")
    return 0 if figures["holds"] else 1


def wait_served(port: int, limit_s: float = 60.0) -> None:
    """Until a completion is answered."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            Tenant(port, SPY).ask("are you there")
            return
        except SystemExit:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
