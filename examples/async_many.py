"""Many requests at once from one process: python examples/async_many.py [ENDPOINT] [COUNT]

Needs a running service: `xllm serve`.
"""

from __future__ import annotations

import asyncio
import sys
import time

from xllm import AsyncClient
from xllm.errors import OverloadedError


async def ask(client: AsyncClient, number: int) -> int:
    """One request; a full queue is waited out. Returns its new tokens."""
    while True:
        try:
            done = await client.generate(f"Request {number}:", max_tokens=16, timeout_s=60)
        except OverloadedError as error:
            await asyncio.sleep(error.retry_after_s)
            continue
        return done.usage.completion_tokens


async def run(endpoint: str, count: int) -> None:
    """All of them, at the same time, over one connection."""
    async with AsyncClient(endpoint) as client:
        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(client, number) for number in range(count))))
        took_s = time.perf_counter() - began
    print(f"{count} requests, {tokens} tokens in {took_s:.2f} s: {tokens / took_s:.0f} tokens/s")


def main() -> int:
    """Entry point."""
    endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:8011"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    asyncio.run(run(endpoint, count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
