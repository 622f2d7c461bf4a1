"""What an instance's own answer takes, without a router: time to the first token, one at a time.

    python -m benchmarks.load_direct --endpoint ipc:///run/i-0 --prompt-ids 800 --seconds 3

It asks as a router does, over the same kind of socket, with a request that was made and encoded
beforehand: what a router adds is what stands between that and its own client's time. Prints one
line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time

import uvloop

from benchmarks.load_zmq import percentile
from xllm.kvcache.hashing import HASH_BYTES
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import AdmitRequest, InstanceReply, TokenBatch
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import pack_tokens
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket

BLOCK_SIZE = 16
NUM_PROMPTS = 64


def requests(num_ids: int, model: str) -> list[bytes]:
    """Encoded requests of so many ids with the names of their blocks."""
    some = random.Random(1)
    return [
        encode(
            AdmitRequest(
                f"{number:032x}",
                1,
                model,
                (),
                SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, seed=number),
                block_hashes=some.randbytes(num_ids // BLOCK_SIZE * HASH_BYTES),
                packed_prompt=pack_tokens(some.choices(range(1024), k=num_ids)),
            )
        )
        for number in range(NUM_PROMPTS)
    ]


async def run(endpoint: str, made: list[bytes], seconds: float) -> list[float]:
    """Seconds to the first token of each, one after the other."""
    transport = Transport()
    answered = asyncio.Event()

    def on_message(message: InstanceReply, frames: list[bytes]) -> None:
        if isinstance(message, TokenBatch):
            answered.set()

    socket = DealerSocket(transport, endpoint, Decoder(InstanceReply), on_message)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        answered.clear()
        socket.send_encoded(made[len(times) % len(made)])
        async with asyncio.timeout(10):
            await answered.wait()
        times.append(time.perf_counter() - began)
    socket.close()
    transport.close()
    return times[len(times) // 4 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--prompt-ids", type=int, required=True)
    parser.add_argument("--model", default="xllm-demo")
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    made = requests(options.prompt_ids, options.model)
    times = uvloop.run(run(options.endpoint, made, options.seconds))
    print(json.dumps({"requests": len(times), "ttft_p50_ms": percentile(times, 0.5)}))


if __name__ == "__main__":
    main()
