"""What the index of cached blocks costs a router: events applied, prompts matched, bytes held.

    python -m benchmarks.index [--json] [--entries 1000000] [--instances 64] [--batch 500]
        [--blocks 1000] [--seconds 2]

One process, one thread, the index alone; times are of its processor. Hashes are random, as content
hashes are. It is filled with `--entries` distinct blocks: chains of `--blocks`, a tenth of each (a
system prompt) held by all instances, the rest by one or two. Then:

events: heartbeats with `--batch` new blocks of one instance and as many removed ones, decoded and
    applied for `--seconds`; the number of blocks stays. The removed ones are a chain, its end
    first, as they are evicted; `events_mixed_per_s`: or in any order. `longest_ms`: of one
    heartbeat.
match: the prompt's blocks are on all instances up to a point of its own each (`spread`), shared in
    part as in the filling (`typical`), on one instance that stored them in pieces of 20 among
    those of other prompts (`pieces`, the dearest), or nowhere (`miss`).
snapshot: 100,000 blocks of one instance replaced.

`match_us_p50` is that of `spread`. `bytes_per_entry`: of the arrays, by distinct block, on the
average of the events' time; `bytes_per_entry_peak`: while they are renewed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import Any

from xllm.kvcache.hashing import HASH_BYTES
from xllm.kvcache.index import KvIndex
from xllm.protocol.bus import BlockEvents, BusMessage, InstanceHeartbeat
from xllm.protocol.codec import Decoder, encode

MAX_BYTES = 1 << 30
SNAPSHOT_BLOCKS = 100_000


def fresh(count: int) -> bytes:
    """So many hashes that nobody had."""
    return os.urandom(HASH_BYTES * count)


def fill(index: KvIndex, names: list[str], entries: int, blocks: int) -> list[bytes]:
    """The chains that it was filled with."""
    rng = random.Random(1)
    system = fresh(blocks // 10)
    for name in names:
        index.apply(name, system)
    chains = []
    while index.statistics().num_keys < entries:
        own = fresh(blocks - blocks // 10)
        for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2)))):
            index.apply(name, own)
        chains.append(system + own)
    return chains


def measure_events(
    index: KvIndex, names: list[str], batch: int, seconds: float, is_mixed: bool = False
) -> dict[str, float]:
    """Events a second, the longest heartbeat in ms, bytes an entry on the average and at most.
    `is_mixed`: blocks go in any order."""
    decoder: Decoder[BusMessage] = Decoder(BusMessage)
    spent, count, turn, longest = 0.0, 0, 0, 0.0
    sizes = []
    held: dict[str, bytes] = dict.fromkeys(names, b"")
    order = list(reversed(range(batch)))
    if is_mixed:
        random.Random(3).shuffle(order)
    while spent < seconds:
        name = names[turn % len(names)]
        stored = [fresh(1) for _ in range(batch)]
        events = (BlockEvents(b"".join(stored), held[name]),)
        held[name] = b"".join([stored[at] for at in order])
        word = encode(InstanceHeartbeat(name, "1", turn + 1, "ready", events=events))
        turn += 1
        began = time.thread_time()
        beat = decoder.decode(word)
        assert isinstance(beat, InstanceHeartbeat)
        for one in beat.events:
            index.apply(name, one.stored, one.removed, one.tier)
        took = time.thread_time() - began
        spent += took
        longest = max(longest, took)
        count += (len(events[0].stored) + len(events[0].removed)) // HASH_BYTES
        sizes.append(index.statistics().num_bytes / index.statistics().num_keys)
    for name, rest in held.items():
        index.apply(name, b"", rest)
    return {
        "rate": round(count / spent),
        "longest_ms": round(longest * 1000, 1),
        "bytes": round(statistics.mean(sizes), 1),
        "bytes_peak": round(max(sizes), 1),
    }


def measure_match(index: KvIndex, prompts: list[bytes], seconds: float) -> dict[str, float]:
    """Microseconds, median and 99th percentile."""
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < 200:
        prompt = prompts[len(times) % len(prompts)]
        start = time.thread_time_ns()
        index.match(prompt)
        times.append((time.thread_time_ns() - start) / 1000)
    p99 = statistics.quantiles(times, n=100)[98]
    return {"p50": round(statistics.median(times), 1), "p99": round(p99, 1)}


def spread_prompts(index: KvIndex, names: list[str], blocks: int, count: int) -> list[bytes]:
    """Prompts of which each instance has another part."""
    prompts = []
    for number in range(count):
        prompt = fresh(blocks)
        for at, name in enumerate(names):
            length = 1 + (at + number) % len(names) * (blocks - 1) // max(1, len(names) - 1)
            index.apply(name, prompt[: length * HASH_BYTES])
        prompts.append(prompt)
    return prompts


def piecewise_prompts(index: KvIndex, name: str, blocks: int, count: int) -> list[bytes]:
    """Prompts that were computed together, each in pieces of 20 blocks."""
    prompts = [fresh(blocks) for _ in range(count)]
    piece = 20 * HASH_BYTES
    for start in range(0, blocks * HASH_BYTES, piece):
        for prompt in prompts:
            index.apply(name, prompt[start : start + piece])
    return prompts


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    names = [f"instance-{number}" for number in range(args.instances)]
    index = KvIndex(MAX_BYTES)
    chains = fill(index, names, args.entries, args.blocks)
    mixed = measure_events(index, names, args.batch, args.seconds / 2, is_mixed=True)
    events = measure_events(index, names, args.batch, args.seconds)
    spread = spread_prompts(index, names, args.blocks, 50)
    random.Random(2).shuffle(chains)
    pieces = piecewise_prompts(index, names[0], args.blocks, 50)
    part = args.seconds / 4
    match = {
        "spread": measure_match(index, spread, part),
        "typical": measure_match(index, chains, part),
        "pieces": measure_match(index, pieces, part),
        "miss": measure_match(index, [fresh(args.blocks) for _ in range(50)], part),
    }
    snapshot = fresh(SNAPSHOT_BLOCKS)
    index.replace(names[0], "device", snapshot)
    began = time.thread_time()
    index.replace(names[0], "device", snapshot)
    replaced = time.thread_time() - began
    counts = index.statistics()
    return {
        "events_per_s": events["rate"],
        "match_us_p50": match["spread"]["p50"],
        "bytes_per_entry": events["bytes"],
        "bytes_per_entry_peak": events["bytes_peak"],
        "events_mixed_per_s": mixed["rate"],
        "entries": counts.num_keys,
        "entries_by_publisher": counts.num_entries,
        "instances": args.instances,
        "batch": args.batch,
        "blocks": args.blocks,
        "match_us": match,
        "snapshot_ms": round(replaced * 1000, 1),
        "longest_ms": events["longest_ms"],
        "rebuilds": counts.num_rebuilt,
        "bytes": counts.num_bytes,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The index of cached blocks.")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    figures = measure(parser.parse_args())
    if parser.parse_args().json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
