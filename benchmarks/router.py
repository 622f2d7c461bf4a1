"""The router's own cost, beside a router that does not tokenize.

    python -m benchmarks.router [--peer-python PYTHON --peer-backend PROGRAM] [--json]

Requests a second before instances that take no time: chat text and token ids over HTTP, token ids
over ZeroMQ, and a peer (`sglang-router`, installed elsewhere) with the same chat text, in turn, A
B A B, medians. All processes share the machine, and CPU microseconds are those of all routers
together, sampled by kind of work where py-spy may look. Then what a router adds to the time to the
first token, by size of the prompt: over what a client waits that asks an instance itself, as a
router does.

`added_ttft_ms[text|ids][KB]`: `1`, one request at a time; `20`, twenty clients that pause as long
as keeps about a core busy; `20_closed`, twenty that never pause, over twenty of a bare HTTP
answerer: on few cores that is a queue, and a time is the queue's length times a request's CPU;
`direct`, what was subtracted; `cpu_ms`, the routers' CPU for one request.
`tokenize_cpu_ms` is what the tokenizer takes that remembers nothing. `second_turn_ms`: a
conversation of 220 KB that goes on, one request at a time. `peer_rps` is null without a peer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.router_hosts import Host, OurHost, PeerHost, add_flags, make_log
from benchmarks.second_turn import second_turns
from benchmarks.service import free_port, run_load, wait_http
from benchmarks.split import sample
from benchmarks.texts import prompts

SIZES_KB = (2, 20, 220)
HTTP = "{python} -m benchmarks.load_http --url {url} --seconds {seconds} --concurrency {many} "
ZMQ = "{python} -m benchmarks.load_zmq --endpoint {url} --seconds {seconds} --concurrency {many} "
KEYS = {"send and receive": "send", "HTTP": "http"}
ZMQ_THREADS = "ZMQbg"
LOOK_S = 0.2
BUSY_S = 60.0
"""By when a load has begun."""


def say(text: str) -> None:
    """Progress; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


class RouterBench:
    """The hosts and the figures so far."""

    def __init__(self, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.options = options
        log = stack.enter_context(make_log(options.log))
        self.ours = OurHost(log, options.routers, options.instances, options.model, options.serve)
        stack.callback(self.ours.close)
        self.peer: PeerHost | None = None
        if options.peer_python:
            backend = options.peer_backend
            self.peer = PeerHost(log, options.peer_python, backend, options.instances)
            stack.callback(self.peer.close)
        self.bare = Host(log)
        stack.callback(self.bare.close)
        port = free_port()
        self.bare.http = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "benchmarks.mock_backend", "--port", str(port)]
        wait_http(self.bare.http, self.bare.start(command))

    # -- requests a second -------------------------------------------------------------------

    def load(self, template: str, url: str, flags: str, *, many: int = 64) -> dict[str, Any]:
        """One generator run."""
        names = {"python": sys.executable, "seconds": self.options.seconds, "many": many}
        result = run_load(template.format(url=url, **names) + flags)
        if result["errors"] or not result["requests"]:
            raise SystemExit(f"{url} {flags}: {result}")
        return result

    def rates(self) -> dict[str, Any]:
        """Medians of requests/s and of the routers' CPU a request, all cases in turn."""
        ids = len(self.ours.text.encode(prompts(512, 256, 1)[0]))
        ids_flags = f"--prompt-ids {ids} --vocab-size {self.ours.text.num_tokens}"
        base = self.ours.http
        cases = {
            "http_text": (self.ours, HTTP, f"{base}/v1/chat/completions", ""),
            "http_ids": (self.ours, HTTP, f"{base}/v1/completions", ids_flags),
            "zmq": (self.ours, ZMQ, ",".join(self.ours.zmq), f"{ids_flags} --batch"),
        }
        host: Host
        if self.peer is not None:
            url = f"{self.peer.http}/v1/chat/completions"
            cases["peer"] = (self.peer, HTTP, url, "--model mock --count events")
        found: dict[str, list[float]] = {name: [] for name in cases}
        cpu: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(self.options.reps):
            for name, (host, template, url, flags) in cases.items():
                before = host.router_cpu_s()
                result = self.load(template, url, flags)
                spent = host.router_cpu_s() - before
                # The warm-up second is in the CPU time but not in the count.
                num = result["requests"] * (self.options.seconds + 1) / self.options.seconds
                found[name].append(result["requests_s"])
                cpu[name].append(1e6 * spent / num)
                say(f"{name} {result['requests_s']:,} requests/s, {cpu[name][-1]:.0f} us of CPU")
        split = {name: {"total": round(statistics.median(cpu[name]), 1)} for name in cases}
        if self.options.split:
            for name, (host, template, url, flags) in cases.items():
                if host is self.ours:
                    split[name] |= self.split(template, url, flags, split[name]["total"])
        rates = {f"{name}_rps": statistics.median(values) for name, values in found.items()}
        return {"peer_rps": None, **rates, "cpu_us": split, "samples": found}

    def split(self, template: str, url: str, flags: str, total: float) -> dict[str, float]:
        """CPU microseconds a request by kind of work: what threads of ZeroMQ take is counted, the
        rest is sampled in one router, Python's frames only. Empty where it may not be sampled."""
        kinds: dict[str, int] = {}
        ours = self.ours
        seconds = max(1.0, self.options.seconds)  # of the load's, and a warm-up second
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            done = pool.submit(self.sample_under_load, seconds, kinds)
            before = ours.router_cpu_s(), ours.router_cpu_s(ZMQ_THREADS)
            self.load(template, url, flags)
            spent = ours.router_cpu_s() - before[0]
            io_share = (ours.router_cpu_s(ZMQ_THREADS) - before[1]) / spent
            try:
                done.result()
            except (OSError, subprocess.SubprocessError) as error:
                say(f"no split: {error}")
                return {}
        every = sum(kinds.values()) or 1
        found = {KEYS.get(kind, kind): count / every for kind, count in kinds.items()}
        split = {kind: total * (1 - io_share) * share for kind, share in found.items()}
        split["send"] = split.get("send", 0.0) + total * io_share
        return {kind: round(split[kind], 1) for kind in sorted(split, key=lambda k: -split[k])}

    def sample_under_load(self, seconds: float, kinds: dict[str, int]) -> None:
        """Sample a router once it works: generators make their prompts first, for seconds."""
        deadline = time.monotonic() + BUSY_S
        before, busy = self.ours.router_cpu_s(), 0.0
        while busy < LOOK_S / 4 and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            after = self.ours.router_cpu_s()
            before, busy = after, after - before
        sample(self.ours.routers[0].pid, seconds, kinds)

    # -- time to the first token -------------------------------------------------------------

    def added_ttft(self) -> dict[str, Any]:
        """Medians, less those of an instance that is asked without a router."""
        added: dict[str, dict[str, dict[str, float]]] = {"text": {}, "ids": {}}
        tokenize: dict[str, float] = {}
        for size in SIZES_KB:
            chars = size * 1000
            flags = f"--stream --shared-chars 0 --pool {max(512, 4096 // size)} "
            tokenize[str(size)] = self.tokenize_cpu_ms(chars)
            vocab = self.ours.text.num_tokens
            ids_flags = f"{flags} --prompt-ids {chars // 5} --vocab-size {vocab}"
            text_flags = f"{flags} --prompt-chars {chars}"
            num_ids = len(self.ours.text.encode(prompts(chars, 0, 1)[0], False))
            added["text"][str(size)] = self.ttft("/v1/chat/completions", text_flags, num_ids)
            added["ids"][str(size)] = self.ttft("/v1/completions", ids_flags, chars // 5)
            say(f"{size} KB: {added['text'][str(size)]} {added['ids'][str(size)]}")
        return {"added_ttft_ms": added, "tokenize_cpu_ms": tokenize}

    def ttft(self, path: str, flags: str, num_ids: int) -> dict[str, float]:
        """For one client, for twenty that pause, and for twenty that do not."""
        earlier = self.direct_ms(num_ids)
        before = self.ours.router_cpu_s()
        result = self.load(HTTP, self.ours.http + path, flags, many=1)
        spent_ms = 1e3 * (self.ours.router_cpu_s() - before)
        num = result["requests"] * (self.options.seconds + 1) / self.options.seconds
        one = result["ttft_p50_ms"]
        direct = (earlier + self.direct_ms(num_ids)) / 2
        # Each client asks, waits about as long as twenty requests take, and asks again.
        pausing = f"{flags} --pause-ms {20 * one}"
        many = self.load(HTTP, self.ours.http + path, pausing, many=20)["ttft_p50_ms"]
        closed, closed_alone = [
            self.load(HTTP, host.http + path, flags, many=20)["ttft_p50_ms"]
            for host in (self.ours, self.bare)
        ]
        return {
            "1": round(one - direct, 3),
            "20": round(many - direct, 3),
            "20_closed": round(closed - closed_alone, 3),
            "direct": round(direct, 3),
            "cpu_ms": round(spent_ms / num, 3),
        }

    def direct_ms(self, num_ids: int) -> float:
        """Median for one client of an instance, without a router."""
        flags = f"--endpoint {self.ours.instance} --model {self.ours.model} --prompt-ids {num_ids}"
        found = run_load(
            f"{sys.executable} -m benchmarks.load_direct {flags} --seconds {self.options.seconds}"
        )
        return float(found["ttft_p50_ms"])

    def tokenize_cpu_ms(self, chars: int) -> float:
        """CPU of the tokenizer alone for a text of that size."""
        spent = []
        for text in prompts(chars, 0, 5, time.time_ns()):
            began = time.process_time()
            self.ours.text.encode(text, False)
            spent.append(time.process_time() - began)
        return round(1e3 * statistics.median(spent), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--turns", type=int, default=10, help="second turns to time")
    parser.add_argument("--only", choices=("", "rates", "ttft", "turns"), default="")
    parser.add_argument("--no-split", dest="split", action="store_false")
    parser.add_argument("--json", action="store_true", help="one line, not indented")
    parser.add_argument("--log", default="/tmp/xllm-router-bench.log")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its processes end with it
    with contextlib.ExitStack() as stack:
        bench = RouterBench(options, stack)
        if options.only in ("", "rates"):
            result |= bench.rates()
        if options.only in ("", "ttft"):
            result |= bench.added_ttft()
        if options.only in ("", "turns"):
            ours = bench.ours
            result |= second_turns(ours.http, ours.model, options.turns, ours.router_cpu_s)
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
