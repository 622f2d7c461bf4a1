"""The engine against transformers' `generate` on one accelerator, in turns.

    python -m benchmarks.device_generate [--shape 0.6b] [--device cuda] [--turns 5] [--json]

A model of random weights in bfloat16, greedy, exact output lengths. `mixed`: 32 requests at once
of 32 to 1,024 tokens in and 16 to 128 out (W3). `equal`: 32 of 512 in and 128 out. The engine is
a master and its worker process, requests go by ZeroMQ. The peer gets all 32 as one batch, padded
on the left, with a static cache and its compiled decode, in this process, and runs until the
longest answer is done: what a batch of it does. Tokens that were asked for count, for both.
Prints medians of tokens a second and the median of the turns' ratios. The first turn of each is
not counted: it compiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import random
import statistics
import tempfile
import time
from typing import Any

import torch
import uvloop
from transformers import AutoModelForCausalLM

from benchmarks.context import context_length
from benchmarks.peer_hosts import EngineHost, Requests
from benchmarks.random_model import SHAPES, write_random_model
from benchmarks.workloads import make
from xllm.config.environment import prepare_environment
from xllm.config.load import load

_EQUAL = 32, 512, 128
_PAD = 0


def requests_of(workload: str, turn: int) -> Requests:
    """The requests of a workload; ids differ from turn to turn, lengths do not."""
    if workload == "mixed":
        return list(make("W3", turn))
    rng = random.Random(turn)
    count, prompt, output = _EQUAL
    return [([rng.randrange(3, 32000) for _ in range(prompt)], output) for _ in range(count)]


def pad_left(requests: Requests) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [requests, longest prompt], both int64."""
    width = max(len(prompt) for prompt, _ in requests)
    ids = torch.full((len(requests), width), _PAD, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(requests):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


class Peer:
    """transformers with a static cache on a device."""

    def __init__(self, directory: pathlib.Path, device: torch.device) -> None:
        self._device = device
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, local_files_only=True
        )
        self._model = model.to(device).eval()

    def run(self, requests: Requests) -> float:
        """Seconds until all have their tokens."""
        ids, mask = (tensor.to(self._device) for tensor in pad_left(requests))
        most = max(count for _, count in requests)
        began = time.perf_counter()
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=most,
                min_new_tokens=most,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=_PAD,
            )
        if found.shape[1] != ids.shape[1] + most:
            raise RuntimeError(f"the peer gave {found.shape[1] - ids.shape[1]} of {most} tokens")
        found.cpu()
        return time.perf_counter() - began


async def engine_seconds(host: EngineHost, requests: Requests) -> float:
    """Seconds until all have their tokens."""
    clocks = await host.run(requests)
    for index, (_, count) in enumerate(requests):
        if clocks.counts[index] != count:
            raise RuntimeError(f"request {index}: {clocks.counts[index]} of {count} tokens")
    return max(clocks.last.values()) - clocks.start


async def measure(options: argparse.Namespace, directory: pathlib.Path) -> dict[str, Any]:
    """Both, in turns."""
    host = EngineHost(
        load(
            {
                "model.path": str(directory),
                "model.name": options.shape,
                "model.max_model_len": context_length(directory),
                "worker.device": options.device,
                "worker.kv_cache_bytes": str(options.kv_bytes),
                "cluster.log_level": "warning",
            }
        )
    )
    await host.open()
    try:
        peer = Peer(directory, torch.device(options.device))
        return {name: await _turns(host, peer, name, options.turns) for name in ("mixed", "equal")}
    finally:
        await host.close()


async def _turns(host: EngineHost, peer: Peer, workload: str, turns: int) -> dict[str, float]:
    ours, theirs = [], []
    for turn in range(turns + 1):
        requests = requests_of(workload, turn)
        tokens = sum(count for _, count in requests)
        seconds = {}
        for name in ("xllm", "peer") if turn % 2 else ("peer", "xllm"):
            if name == "xllm":
                seconds[name] = await engine_seconds(host, requests)
            else:
                # The master's loop goes on meanwhile: its worker says that it lives.
                seconds[name] = await asyncio.to_thread(peer.run, requests)
        if turn:
            ours.append(tokens / seconds["xllm"])
            theirs.append(tokens / seconds["peer"])
    return {
        "xllm_tok_s": statistics.median(ours),
        "transformers_tok_s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="0.6b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "npu"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kv-bytes", type=int, default=8 << 30)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    prepare_environment()
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU and a CUDA build of torch")
    with tempfile.TemporaryDirectory(prefix="xllm-generate-") as parent:
        directory = write_random_model(SHAPES[options.shape], pathlib.Path(parent) / options.shape)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(measure(options, directory))
    if options.json:
        print(json.dumps(report))
        return
    for workload, found in report.items():
        print(
            f"{workload}: {found['xllm_tok_s']:.0f} tokens/s, transformers "
            f"{found['transformers_tok_s']:.0f}: {found['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
