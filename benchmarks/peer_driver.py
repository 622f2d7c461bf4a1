"""xLLM as a peer: answers the line protocol of `workloads.worker` for one model.

    python benchmarks/peer_driver.py --model DIR [--via engine|zmq|http] [--threads 2]
        [--dtype bfloat16] [--max-model-len 2048] [--set SECTION.FIELD=VALUE ...]

engine: the master in this process and its worker as a child, over their ZeroMQ sockets. zmq and
http: `xllm serve`, through the client library, or through /v1/completions. Greedy, prompts as
token ids, exact lengths. `--set` gives any further setting, `--name` what READY calls the peer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator

if __package__ in (None, ""):  # run as a file: its folder is no place for modules
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import uvloop

from benchmarks.context import context_length
from benchmarks.peer_hosts import LIMIT_S, EngineHost, Host, HttpHost, Requests, ZmqHost
from benchmarks.workloads import worker
from xllm.cli.local_service import local_service
from xllm.config.environment import prepare_environment
from xllm.config.load import load
from xllm.config.table import setting_table
from xllm.errors import XllmError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `settings`: what was asked for, by key, as texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--via", choices=("engine", "zmq", "http"), default="engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--name", default="")
    options = parser.parse_args(arguments)
    settings = {
        "model.path": os.path.abspath(options.model),
        "model.name": pathlib.Path(options.model).resolve().name,
        "model.dtype": options.dtype,
        "model.max_model_len": context_length(options.model, options.max_model_len),
        "worker.num_threads": str(options.threads),
        "cluster.log_level": "warning",
    }
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            parser.error(f"--set {text}: SECTION.FIELD=VALUE is wanted")
        settings[key] = value
    options.settings = settings
    return options


def serve_flags(settings: dict[str, str]) -> list[str]:
    """The settings as flags of `xllm serve`; ports are free ones."""
    table = setting_table()
    load(settings)  # an error here is told in a line, not by a service that does not start
    flags = []
    for key, value in settings.items():
        entry = table[key]
        if entry.type is bool:
            on = value.lower() in ("1", "true", "yes", "on")
            flags.append(entry.flag if on else f"--no-{entry.flag.removeprefix('--')}")
        else:
            flags.append(f"{entry.flag}={value}")
    return flags


@contextlib.contextmanager
def made_host(options: argparse.Namespace) -> Iterator[Host]:
    """The host of `--via`, for the length of the block; a service ends with it."""
    if options.via == "engine":
        yield EngineHost(load(options.settings))
        return
    with local_service(serve_flags(options.settings)) as addresses:
        if options.via == "zmq":
            yield ZmqHost(addresses)
        else:
            yield HttpHost(addresses, options.settings["model.name"])


async def drive(host: Host, meta: dict[str, object]) -> None:
    """Answer standard input on a thread of its own, so that the master's loop goes on."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)

    def run(requests: Requests) -> object:
        future = asyncio.run_coroutine_threadsafe(host.run(requests), loop)
        return future.result(LIMIT_S).result()

    def answer() -> None:
        try:
            worker(meta, run)
        finally:
            loop.call_soon_threadsafe(ended.set)

    await host.open()
    try:
        threading.Thread(target=answer, daemon=True).start()
        await ended.wait()
    finally:
        await host.close()


def main() -> int:
    """The exit code."""
    prepare_environment()
    options = parse()
    meta = {
        "peer": options.name or "xllm",
        "via": options.via,
        "threads": options.threads,
        "dtype": options.dtype,
        "set": options.set,
    }
    try:
        with made_host(options) as host, asyncio.Runner(loop_factory=uvloop.new_event_loop) as run:
            run.run(drive(host, meta))
    except (XllmError, RuntimeError) as error:
        print(f"xllm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread may wait for a line of standard input for ever
